"""Pixels of a decoded image: uint8 RGB, upright, transparency on white.

It is converted band by band and turned in place, so that beside Pillow's own memory (4 bytes a
pixel) only the result exists (3 bytes a pixel).

Samples of more than 8 bits are scaled by their range: 16-bit ones from 0 … 65,535, as PNG defines
them. Pillow itself cuts them off at 255, which leaves white images. Three cases have no defined
range and are read by what is in them: samples that all lie within 0 … 255 are 8-bit values in wider
words and stay as they are; floats within 0 … 1 are fractions of white; anything that exceeds 16
bits, is negative or not finite is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from lvlm.core.errors import ImageError

BAND = 1 << 21  # pixels that are converted at a time
WIDE = ("I", "I;16", "F")  # modes whose samples may have more than 8 bits
# Modes that Pillow reads files into, or gives, but converts to few others: other orders of bytes,
# colors multiplied by their opacity
ODD = {"I;16B": "I", "I;16L": "I", "I;16N": "I", "RGBa": "RGBA", "La": "LA"}
ORIENTATION = 0x0112  # EXIF's tag
BACK = {6: 8, 8: 6}  # orientations that undo others; the rest undo themselves


def rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3]. Raises ImageError for samples without a range (its text goes on after the
    image's name), and whatever Pillow's decoders raise."""
    turn = image.getexif().get(ORIENTATION, 1)
    image.load()
    if image.mode in ODD:
        image = image.convert(ODD[image.mode])
    transparency = image.info.get("transparency")
    transparent = "A" in image.getbands() or transparency is not None
    factor = _factor(image)
    width, height = image.size
    lies = turn in (5, 6, 7, 8)
    upright = np.empty((width, height, 3) if lies else (height, width, 3), np.uint8)
    array = _turned(upright, BACK.get(turn, turn))  # the same memory, as the file has it
    for rows, band in _bands(image):
        if factor is not None:
            array[rows] = _scaled(band, factor, transparency)
            continue
        if transparent:
            band = band.convert("RGBA")
            white = Image.new("RGBA", band.size, (255, 255, 255, 255))
            band = Image.alpha_composite(white, band)
        array[rows] = np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    return upright


def _bands(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Some rows at a time, all where they are few: which, and they."""
    width, height = image.size
    rows = max(1, BAND // width)
    if rows >= height:
        yield slice(height), image
        return
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        yield slice(top, bottom), image.crop((0, top, width, bottom))


def _factor(image: Image.Image) -> float | None:
    """Factor that samples wider than 8 bits are multiplied by; None: they are taken as they are."""
    if image.mode not in WIDE:
        return None
    low, high = (float(x) for x in image.getextrema())  # type: ignore[arg-type]
    if image.mode == "F" and not all(
        np.isfinite(np.asarray(band)).all() for _, band in _bands(image)
    ):
        raise ImageError("has samples that are not finite; save it with 8 bits a sample")
    if low < 0 or high > 65_535:
        raise ImageError(
            f"has samples from {low:g} to {high:g}, whose range is not known; save it with 8 bits "
            "a sample"
        )
    if image.mode == "F" and 0 < high <= 1:
        return 255.0
    return None if high <= 255 else 1 / 257


def _scaled(band: Image.Image, factor: float, transparency: object) -> npt.NDArray[np.uint8]:
    samples = np.asarray(band)
    gray = np.rint(samples * np.float64(factor)).astype(np.uint8)
    if isinstance(transparency, int):
        gray[samples == transparency] = 255
    return np.repeat(gray[:, :, None], 3, axis=2)


def _turned(array: npt.NDArray[np.uint8], turn: object) -> npt.NDArray[np.uint8]:
    """A view of ``array`` [H, W, 3] turned as the EXIF orientation 1 … 8 says."""
    match turn:
        case 2:
            return array[:, ::-1]
        case 3:
            return array[::-1, ::-1]
        case 4:
            return array[::-1]
        case 5:
            return array.swapaxes(0, 1)
        case 6:
            return np.rot90(array, 3)
        case 7:
            return array[::-1, ::-1].swapaxes(0, 1)
        case 8:
            return np.rot90(array)
    return array
