"""Images cut into patches for towers that take any number of them, those of a token together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def patch_values(
    pixels: Sequence[npt.NDArray[np.float32]], patch: int, merge: int, frames: int = 1
) -> npt.NDArray[np.float32]:
    """An image's pixels, token by token, as a convolution over patches takes them.

    Args:
        pixels: [3,H,W] of each of ``frames`` frames, or of one that stands for all; whole tokens.
        patch: Side of a patch.
        merge: Patches along each side of a token.

    Returns:
        [h*w,merge*merge,3*frames*patch*patch], where h*w tokens are H x W pixels.
    """
    side = patch * merge
    rows, columns = pixels[0].shape[1] // side, pixels[0].shape[2] // side
    cut = np.stack(pixels).reshape(-1, 3, rows, merge, patch, columns, merge, patch)
    cut = cut.transpose(2, 5, 3, 6, 1, 0, 4, 7)
    shape = (*cut.shape[:5], frames, patch, patch)
    values = np.broadcast_to(cut, shape).reshape(rows * columns, merge**2, -1)
    return np.require(values, requirements="W")  # of one token it is a view


def patch_places(rows: int, columns: int, merge: int) -> npt.NDArray[np.int64]:
    """Row and column int64 [h*w,merge*merge,2] of every patch of h x w tokens, in that order."""
    grid = np.moveaxis(np.indices((rows * merge, columns * merge)), 0, -1)
    grid = grid.reshape(rows, merge, columns, merge, 2).transpose(0, 2, 1, 3, 4)
    return np.asarray(grid.reshape(rows * columns, merge**2, 2), np.int64)


def whole_tokens(
    height: int,
    width: int,
    side: int,
    min_pixels: float,
    max_pixels: float,
    frames: int = 1,
    bar: int = 1,
    least: int = 0,
) -> tuple[int, int]:
    """Rows and columns of tokens, ``side`` pixels long, in proportion to an image's sides, so that
    their pixels are within bounds: those of ``bar`` frames where there are ``frames``. Before that
    each is ``least`` or more."""
    rows, columns = (max(least, round(length / side)) for length in (height, width))
    if bar * rows * columns * side**2 > max_pixels:
        shrink = math.sqrt((frames * height * width) / max_pixels)
        rows = max(1, math.floor(height / shrink / side))
        columns = max(1, math.floor(width / shrink / side))
    elif bar * rows * columns * side**2 < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        rows = math.ceil(height * grow / side)
        columns = math.ceil(width * grow / side)
    return rows, columns
