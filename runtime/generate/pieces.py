"""Places where a prompt that is read in pieces may be cut.

Where the tokens of an image see one another, those that follow too, a piece has all tokens of an
image, or none: what is read later would not be seen.
"""

from __future__ import annotations

import numpy as np

from lvlm.runtime.bundle.manifest import Images


def next_piece(image_id: np.ndarray, start: int, tokens: int, images: Images) -> range:
    """Places of the next tokens of a prompt with ``image_id`` [N], from ``start`` on: so many at
    most, but for an image that has more and must be read at once."""
    end = min(start + tokens, len(image_id))
    if images.bidirectional and (border := border_before(image_id, end)) < end:
        end = border if border > start else border_behind(image_id, end)
    return range(start, end)


def border_before(image_id: np.ndarray, place: int) -> int:
    """``place``, or where the run of an image's tokens begins that goes across it."""
    while 0 < place < len(image_id) and _within(image_id, place):
        place -= 1
    return place


def border_behind(image_id: np.ndarray, place: int) -> int:
    """``place``, or where the run of an image's tokens ends that goes across it."""
    while 0 < place < len(image_id) and _within(image_id, place):
        place += 1
    return place


def max_at_once(images: Images, tokens: int) -> int:
    """The most tokens of a piece, where so many are asked for."""
    return max(tokens, images.tokens) if images.bidirectional else tokens


def _within(image_id: np.ndarray, place: int) -> bool:
    """True where a cut before ``place`` goes through an image."""
    return bool(image_id[place] > 0 and image_id[place] == image_id[place - 1])
