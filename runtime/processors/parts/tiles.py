"""Images that are scaled to a grid of equal tiles, each of the vision graph's size."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from PIL import Image


def scaled(
    pixels: npt.NDArray[np.uint8], height: int, width: int, resample: int
) -> npt.NDArray[np.uint8]:
    """Pixels [H, W, 3] → [height, width, 3]; ``resample`` is Pillow's filter number."""
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling(resample))
    return np.asarray(image)


def scaled_frame(
    pixels: npt.NDArray[np.uint8], height: int, width: int, resample: int
) -> npt.NDArray[np.uint8]:
    """The same as torch does it, whose order is fixed: the width first, rounded in between. Pillow
    begins with what costs less, which with noise makes ten levels of difference."""
    narrow = scaled(pixels, pixels.shape[0], width, resample)
    return scaled(narrow, height, width, resample)


def cut(pixels: npt.NDArray[np.uint8], rows: int, columns: int) -> npt.NDArray[np.uint8]:
    """Pixels [rows * h, columns * w, 3] → tiles [rows * columns, h, w, 3], row by row."""
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    grid = pixels.reshape(rows, height, columns, width, 3)
    return grid.swapaxes(1, 2).reshape(rows * columns, height, width, 3)


def tile_grid(rows: int, columns: int, tokens: int) -> npt.NDArray[np.int32] | None:
    """The token at each place [rows * n, columns * n] of tiles of n x n = ``tokens`` each, those of
    one before those of the next; None where they are no square."""
    side = math.isqrt(tokens)
    if side**2 != tokens:
        return None
    grid = np.arange(rows * columns * tokens, dtype=np.int32).reshape(rows, columns, side, side)
    return grid.swapaxes(1, 2).reshape(rows * side, columns * side)


def closest_grid(
    height: int, width: int, pixels: int, grids: Iterable[tuple[int, int]]
) -> tuple[int, int]:
    """Rows and columns of tiles of so many pixels: of the ``grids`` of columns and rows that with
    the closest ratio, of equal ones the first, or a later one unless the image has too few pixels
    for it."""
    best, closest = (1, 1), float("inf")
    for columns, rows in grids:
        away = abs(width / height - columns / rows)
        filled = height * width > 0.5 * pixels * columns * rows
        if away < closest or (away == closest and filled):
            best, closest = (rows, columns), away
    return best
