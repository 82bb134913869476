"""What a decoded picture becomes: uint8 RGB, upright, transparency on white.

It is converted band by band, so that beside Pillow's own memory (4 bytes a pixel) only the result
exists (3 bytes a pixel).

Samples of more than 8 bits are scaled by their range: 16-bit ones from 0 … 65,535, as PNG defines
them. Pillow itself cuts them off at 255, which leaves white pictures. Three cases have no defined
range and are read by what is in them: samples that all lie within 0 … 255 are 8-bit values in wider
words and stay as they are; floats within 0 … 1 are fractions of white; anything that exceeds 16
bits, is negative or not finite is refused.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from lvlm.runtime.errors import ImageError

BAND = 1 << 21  # pixels that are converted at a time
WIDE = ("I", "F")  # and all modes that begin with I;
ORIENTATION = 0x0112  # EXIF's tag


def rgb(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3]. Raises ImageError for samples without a range (its text goes on after the
    picture's name), and whatever Pillow's decoders raise."""
    turn = picture.getexif().get(ORIENTATION, 1)
    picture.load()
    transparent = "A" in picture.getbands() or picture.info.get("transparency") is not None
    factor = _factor(picture)
    width, height = picture.size
    array = np.empty((height, width, 3), np.uint8)
    rows = max(1, BAND // width)
    for top in range(0, height, rows):
        box = (0, top, width, min(height, top + rows))
        whole = rows >= height and factor is None
        band = picture if whole else picture.crop(box)
        if factor is not None:
            array[top : box[3]] = _scaled(band, factor, picture.info.get("transparency"))
            continue
        if transparent:
            band = band.convert("RGBA")
            white = Image.new("RGBA", band.size, (255, 255, 255, 255))
            band = Image.alpha_composite(white, band)
        array[top : box[3]] = np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    return np.ascontiguousarray(_upright(array, turn))


def _factor(picture: Image.Image) -> float | None:
    """What samples wider than 8 bits are multiplied by; None: they are taken as they are."""
    if picture.mode not in WIDE and not picture.mode.startswith("I;"):
        return None
    low, high = (float(x) for x in picture.getextrema())  # type: ignore[arg-type]
    if picture.mode == "F" and not np.isfinite(np.asarray(picture)).all():
        raise ImageError("has samples that are not finite; save it with 8 bits a sample")
    if low < 0 or high > 65_535:
        raise ImageError(
            f"has samples from {low:g} to {high:g}, whose range is not known; save it with 8 bits "
            "a sample"
        )
    if picture.mode == "F" and 0 < high <= 1:
        return 255.0
    return None if high <= 255 else 1 / 257


def _scaled(band: Image.Image, factor: float, transparency: object) -> npt.NDArray[np.uint8]:
    samples = np.asarray(band)
    gray = np.rint(samples * np.float64(factor)).astype(np.uint8)
    if isinstance(transparency, int):
        gray[samples == transparency] = 255
    return np.repeat(gray[:, :, None], 3, axis=2)


def _upright(array: npt.NDArray[np.uint8], turn: object) -> npt.NDArray[np.uint8]:
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
