"""What became of each patch of an answer's images, for a client that draws it."""

from __future__ import annotations

from typing import Any

import numpy as np

from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.tools.show_merge import after_each_reduction

DROPPED, KEPT = -1, 0


def patches(manifest: Manifest, answer: Generation) -> list[dict[str, Any]]:
    """Of each image the grid of its patches, row by row: KEPT, DROPPED, or the number of the token
    that several of them became; none where a family has no grid that is the same for all images.
    """
    rows, columns = manifest.images.grid or (0, 0)
    count = int(answer.image_id.max(initial=0))
    # A class token comes before the patches
    spare = manifest.images.tokens - rows * columns
    if not rows or not count or spare not in (0, 1) or manifest.encoder is not None:
        return []
    fate = _fates(answer)
    found = []
    for number in range(1, count + 1):
        own = fate[np.flatnonzero(answer.image_id == number)][spare:]
        if len(own) != rows * columns:
            return []
        found.append({"rows": rows, "columns": columns, "patches": own.tolist()})
    return found


def _fates(answer: Generation) -> np.ndarray:
    """Of each prompt token, after the last reduction."""
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
