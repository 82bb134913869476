"""Opening pictures: any source becomes an RGB array, of a size that is safe to work on."""

from __future__ import annotations

import io
import os
import reprlib
import warnings
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from lvlm.runtime.errors import ImageError

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any]

MAX_PIXELS = 100_000_000
MAX_SIDE = 32_768

# Not all that Pillow knows: its EPS reader starts Ghostscript, and its icon readers decode a
# picture of another size than they announce. The first five need no other plugins to be imported.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF")


def open_image(source: ImageSource) -> npt.NDArray[np.uint8]:
    """The picture as uint8 [H, W, 3], RGB.

    ``source`` is a path, the bytes of an image file, a PIL image, or a uint8 array [H, W, 3] or
    [H, W]. Files and bytes are turned upright by their EXIF orientation, as transformers'
    ``load_image`` does; animations give their first frame. Transparency is laid on white, as
    transformers' image processors do. An array [H, W, 3] is returned as it is, not copied.

    Raises ``ImageError`` if there is no such picture, it cannot be decoded, it is empty, or it has
    over 100 megapixels or a side over 32,768 pixels; sizes are checked before anything is decoded.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _decode(source, "the PIL image", orient=False)
    if isinstance(source, bytes):
        return _from_file(io.BytesIO(source), f"the picture given as {len(source)} bytes")
    if isinstance(source, str | os.PathLike):
        return _from_path(source)
    raise ImageError(
        f"a picture cannot be made from {type(source).__name__}; give a path, bytes, a PIL image, "
        "or an array [H, W, 3] of uint8"
    )


def _from_path(path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    name = f"picture {os.fspath(path)!r}"
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below, outside of this try
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist; check it (URLs are not downloaded)") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a folder; name a file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name} cannot be opened: {reason}") from None
    with file:
        return _from_file(file, name)


def _from_file(file: BinaryIO, name: str) -> npt.NDArray[np.uint8]:
    with warnings.catch_warnings():
        # Of large pictures and odd files: what is too large or damaged is decided and said here
        warnings.simplefilter("ignore")
        try:
            picture = Image.open(file, formats=_FORMATS)
        except Image.DecompressionBombError:
            raise _too_large(name) from None
        except Exception:  # readers raise nearly anything for a file that is none of theirs
            raise ImageError(
                f"{name} is not an image that can be read; give PNG, JPEG, WebP, BMP, GIF or TIFF"
            ) from None
        with picture:
            return _decode(picture, name, orient=True)


def _decode(picture: Image.Image, name: str, orient: bool) -> npt.NDArray[np.uint8]:
    _check_size(picture.height, picture.width, name)
    try:
        if orient:
            picture = ImageOps.exif_transpose(picture)
        if "A" in picture.getbands() or picture.info.get("transparency") is not None:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
            picture = Image.alpha_composite(white, picture)
        return np.array(picture.convert("RGB"))
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except Exception as error:  # as above: decoders raise nearly anything for damaged data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(
            f"{name} is damaged or cut short ({reason}); save it again as PNG or JPEG"
        ) from None


def _from_array(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    name = f"the array of shape {reprlib.repr(list(array.shape))}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ImageError(
            f"{name} is not a picture; give [H, W, 3] (RGB, channels last) or [H, W] (gray)"
        )
    if array.dtype != np.uint8:
        raise ImageError(f"{name} has dtype {array.dtype}; give uint8 with values 0 to 255")
    _check_size(array.shape[0], array.shape[1], name)
    return array if array.ndim == 3 else np.repeat(array[:, :, None], 3, axis=2)


def _check_size(height: int, width: int, name: str) -> None:
    if height < 1 or width < 1:
        raise ImageError(
            f"{name} is empty ({width} x {height} pixels); it needs at least one pixel"
        )
    if height > MAX_SIDE or width > MAX_SIDE or height * width > MAX_PIXELS:
        raise _too_large(f"{name} ({width} x {height} pixels)")


def _too_large(name: str) -> ImageError:
    return ImageError(
        f"{name} is too large; scale it down to at most {MAX_PIXELS // 10**6} megapixels "
        f"and {MAX_SIDE} pixels a side"
    )
