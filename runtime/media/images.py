"""Open images: any source becomes an RGB array, of a size that is safe to work on."""

from __future__ import annotations

import io
import os
import reprlib
import warnings
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from lvlm.core.errors import ImageError, shown
from lvlm.core.opening import at_once
from lvlm.runtime.media.data_url import data_of_url
from lvlm.runtime.media.pixels import rgb

ImageSource: TypeAlias = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | BinaryIO
    | Image.Image
    | npt.NDArray[Any]
)

MAX_PIXELS = 64_000_000  # of an image, unless a call says otherwise: 450 MB while it is decoded
PILLOW_MAX_PIXELS = 178_956_970  # that a call may say: Pillow opens no larger files
MAX_SIDE = 32_768

# Not all that Pillow knows: its EPS reader starts Ghostscript, and its icon readers decode an
# image of another size than they announce. The first five need no other plugins to be imported.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF")
_TAKEN = (
    "a path, a data: URL, bytes, a file opened in binary mode, a PIL image, or an array [H, W, 3] "
    "of uint8"
)


def open_image(source: ImageSource, max_pixels: int | None = None) -> npt.NDArray[np.uint8]:
    """The image as uint8 [H, W, 3], RGB.

    Files, bytes and PIL images are turned upright by their EXIF orientation, as transformers'
    ``load_image`` does; animations give their first frame. Transparency is laid on white, as
    transformers' image processors do. Samples of more than 8 bits are scaled by their range
    (``pixels.py``). While a file is decoded about 7 bytes a pixel are needed (WebP: 15).

    Args:
        source: a path, a ``data:`` URL, the bytes of an image file, such a file opened in binary
            mode (read from where it stands, not closed), a PIL image, or a uint8 array [H, W, 3]
            or [H, W]. An array [H, W, 3] is returned as it is, not copied.
        max_pixels: pixels that an image may have; None: MAX_PIXELS.

    Raises ImageError if there is no such image, it cannot be decoded, it is empty, or it has more
    pixels or a side over 32,768; sizes are checked before anything is decoded.
    """
    max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        return _decode(source, "the PIL image", max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        return _from_file(io.BytesIO(data), f"the image given as {len(data)} bytes", max_pixels)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _from_file(io.BytesIO(data_of_url(source)), "the image in the data: URL", max_pixels)
    if isinstance(source, str | os.PathLike):
        return _from_path(source, max_pixels)
    if hasattr(source, "read") and hasattr(source, "seek"):
        return _from_file(_whole(source), "the image in the opened file", max_pixels)
    raise ImageError(f"an image cannot be made from {_described(source)}; give {_TAKEN}")


def _described(source: object) -> str:
    """A type's name and, where it has one, its shape: of a torch tensor, say."""
    shape = getattr(source, "shape", None)
    name = type(source).__name__
    return name if shape is None else f"{name} of shape {reprlib.repr(list(shape))}"


def _whole(file: Any) -> BinaryIO:
    """Content of an opened file from where it stands: Pillow would read it later, and close it."""
    try:
        data = file.read()
    except Exception as error:  # whatever such an object raises
        raise ImageError(f"the opened file cannot be read: {error}") from None
    if not isinstance(data, bytes | bytearray):
        raise ImageError("the opened file gives text; open it in binary mode, 'rb'")
    return io.BytesIO(data)


def _from_path(path: str | os.PathLike[str], max_pixels: int) -> npt.NDArray[np.uint8]:
    name = f"image {shown(os.fspath(path), 300)}"
    try:
        file = open(path, "rb", opener=at_once)  # noqa: SIM115 - closed outside of this try
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist; check it (URLs are not downloaded)") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a folder; name a file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name} cannot be opened: {reason}") from None
    with file:
        return _from_file(file, name, max_pixels)


def _from_file(file: BinaryIO, name: str, max_pixels: int) -> npt.NDArray[np.uint8]:
    with warnings.catch_warnings():
        # Of large images and odd files: what is too large or damaged is decided and said here
        warnings.simplefilter("ignore")
        try:
            image = Image.open(file, formats=_FORMATS)
        except Image.DecompressionBombError:
            raise _too_large(name, max_pixels) from None
        except Exception:  # readers raise nearly anything for a file that is none of theirs
            raise ImageError(
                f"{name} is not an image that can be read; give PNG, JPEG, WebP, BMP, GIF or TIFF"
            ) from None
        with image:
            return _decode(image, name, max_pixels)


def _decode(image: Image.Image, name: str, max_pixels: int) -> npt.NDArray[np.uint8]:
    _check_size(image.height, image.width, name, max_pixels)
    try:
        return rgb(image)
    except ImageError as error:
        raise ImageError(f"{name} {error}") from None
    except Image.DecompressionBombError:
        raise _too_large(name, max_pixels) from None
    except Exception as error:  # as above: decoders raise nearly anything for damaged data
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageError(
            f"{name} is damaged or cut short ({reason}); save it again as PNG or JPEG"
        ) from None


def _from_array(array: npt.NDArray[Any], max_pixels: int) -> npt.NDArray[np.uint8]:
    name = f"the array of shape {reprlib.repr(list(array.shape))} and dtype {array.dtype}"
    wanted = "give uint8 [H, W, 3] (RGB, channels last) or [H, W] (gray)"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        if array.ndim == 3 and array.shape[0] == 3:
            wanted = f"its channels come first: {wanted}, as array.transpose(1, 2, 0) is"
        raise ImageError(f"{name} is not an image; {wanted}")
    if array.dtype != np.uint8:
        raise ImageError(f"{name} is not an image; {wanted}, with values 0 to 255")
    _check_size(array.shape[0], array.shape[1], name, max_pixels)
    return array if array.ndim == 3 else np.repeat(array[:, :, None], 3, axis=2)


def _check_size(height: int, width: int, name: str, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise ImageError(
            f"{name} is empty ({width} x {height} pixels); it needs at least one pixel"
        )
    if height > MAX_SIDE or width > MAX_SIDE or height * width > max_pixels:
        raise _too_large(f"{name} ({width} x {height} pixels)", max_pixels)


def _too_large(name: str, max_pixels: int) -> ImageError:
    return ImageError(
        f"{name} is too large; scale it down to at most {max_pixels:,} pixels in all and "
        f"{MAX_SIDE:,} a side, or raise max_image_pixels"
    )
