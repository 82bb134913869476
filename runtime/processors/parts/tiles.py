"""Images that are scaled to a grid of equal tiles, each of the vision graph's size."""

from __future__ import annotations

import math

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
