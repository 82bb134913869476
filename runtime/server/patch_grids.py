"""Grids of the patches of an answer's images, for a client that draws which were kept."""

from __future__ import annotations

from typing import Any

import numpy as np

from lvlm.runtime.bundle.manifest import Images, Manifest
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.media.prepared_image import Box
from lvlm.runtime.tools.show_merge import after_each_reduction

DROPPED, KEPT = -1, 0
MERGE = ("visionzip",)  # rules that mix tokens into those that go on, and tell of no map


def patches(manifest: Manifest, answer: Generation) -> list[dict[str, Any]]:
    """Grid of each image's patches, row by row: KEPT, DROPPED, or the number of the token that
    several of them became; and the ``box`` that the grid covers: left, top, right and bottom in
    widths and heights of the image, beyond 0 and 1 where it was padded.

    A patch is KEPT as the last block had it. What is mixed into tokens that go on from the encoder
    counts as DROPPED, which ``encoder_merges`` tells, and so does a patch of a tile that is left
    only in the small copy of the whole image. None where a grid is not known.
    """
    fate, encoder = _fates(answer), manifest.encoder
    found = []
    for number, image in enumerate(answer.images, 1):
        grid, box = image.grid, image.box
        if grid is None:
            grid, box = _fixed(manifest.images, box)
        if grid is None:
            return []
        tokens = np.full(max(int(grid.max()), int(image.rows.max(initial=0))) + 2, DROPPED)
        tokens[image.rows] = fate[answer.image_id == number]
        rows, columns = grid.shape
        shown = {
            "rows": rows,
            "columns": columns,
            "box": [round(side, 5) for side in box],
            "encoder_merges": encoder is not None and encoder.rule in MERGE,
            "patches": tokens[grid].ravel().tolist(),
        }
        found.append(shown)
    return found


def _fixed(images: Images, box: Box) -> tuple[np.ndarray | None, Box]:
    """The token at each place of the grid that all images have, and the box that it covers; a
    class token comes before the patches, or the first patch has none."""
    rows, columns = images.grid or (0, 0)
    spare = images.tokens - rows * columns
    if not rows or abs(spare) > 1:
        return None, box
    left, top, right, low = box
    # Pixels beyond the last whole patch reach no token
    down, across = (
        side // count * count / side for side, count in zip(images.size, images.grid, strict=True)
    )
    covered = (left, top, left + (right - left) * across, top + (low - top) * down)
    return spare + np.arange(rows * columns).reshape(rows, columns), covered


def _fates(answer: Generation) -> np.ndarray:
    """Fate of each prompt token, after the last reduction."""
    if not answer.merge_maps:
        return np.full(len(answer.image_id), KEPT)
    fate, group = np.full(len(answer.image_id), DROPPED), 0
    for token in after_each_reduction(answer)[-1]:
        if len(token.members) == 1:
            fate[token.members[0]] = KEPT
        else:
            group += 1
            fate[list(token.members)] = group
    return fate
