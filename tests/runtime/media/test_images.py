"""Every source of an image, the conversions of transformers, files that are broken or large."""

from __future__ import annotations

import base64
import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lvlm.core.errors import ImageError, ParameterError
from lvlm.runtime.media.images import MAX_PIXELS, PILLOW_MAX_PIXELS, open_image
from lvlm.runtime.options.generation_options import GenerationOptions

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 11, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces its size and has no pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    data = b"IDAT"
    return (
        b"\x89PNG\r\n\x1a\n"
        + body
        + struct.pack(">I", 0)
        + data
        + struct.pack(">I", zlib.crc32(data))
    )


def test_all_sources_give_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image = Image.fromarray(PIXELS)
    image.save(path)
    data = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    sources = [path, str(path), data, bytearray(data), memoryview(data), image, PIXELS, url]
    with path.open("rb") as file:
        for source in (
            *sources,
            file,
            io.BytesIO(data),
            "data:image/png," + quote_from_bytes(data),
        ):
            opened = open_image(source)
            assert opened.dtype == np.uint8
            np.testing.assert_array_equal(opened, PIXELS)
        assert not file.closed


class Tensor:
    """Of another library: no array, but with a shape."""

    shape = (3, 4, 5)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (None, "from NoneType; give a path"),
        ({"url": "a"}, "from dict"),
        (Tensor(), r"from Tensor of shape \[3, 4, 5\]"),
        (io.StringIO("text"), "binary mode"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,@@", "no valid base64"),
        ("data:,\ud800", "not valid Unicode"),
        ("data:image/png;base64,aGVsbG8=", "data: URL is not an image"),
        ("x" * 5000, "cannot be opened: File name too long"),
    ],
)
def test_what_is_no_image(source: Any, problem: str) -> None:
    with pytest.raises(ImageError, match=problem) as caught:
        open_image(source)
    assert len(str(caught.value)) < 400


def test_gray_array_becomes_rgb() -> None:
    opened = open_image(PIXELS[:, :, 0])
    np.testing.assert_array_equal(opened, np.stack([PIXELS[:, :, 0]] * 3, axis=2))


def image_of_mode(mode: str) -> Image.Image:
    rng = np.random.default_rng(1)
    if mode == "P with transparency":
        return Image.open(io.BytesIO(encoded(image_of_mode("P"), transparency=3)))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 256, (5, 6), np.uint16))
    if mode == "P":
        return Image.fromarray(PIXELS).quantize(16)
    if mode == "LAB":
        return Image.new("LAB", (3, 2), (90, 20, 200))
    if mode in ("I", "F", "1", "HSV"):
        return Image.fromarray(PIXELS).convert("RGB" if mode == "HSV" else "L").convert(mode)
    bands = Image.new(mode, (1, 1)).getbands()
    return Image.merge(
        mode, [Image.fromarray(rng.integers(0, 256, (5, 6), np.uint8)) for _ in bands]
    )


MODES = ["1", "L", "LA", "P", "P with transparency", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"]


@pytest.mark.parity
@pytest.mark.parametrize("mode", [*MODES, "I", "F", "I;16"])
def test_modes_convert_as_in_transformers(mode: str) -> None:
    from transformers.image_transforms import convert_to_rgb

    image = image_of_mode(mode)
    expected = convert_to_rgb(image, return_numpy=True)
    np.testing.assert_array_equal(open_image(image), expected)


@pytest.mark.parity
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_files_is_applied(orientation: int, tmp_path: Path) -> None:
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(PIXELS), exif=exif))
    expected = np.asarray(load_image(str(path)))
    np.testing.assert_array_equal(open_image(path), expected)
    np.testing.assert_array_equal(open_image(path.read_bytes()), expected)
    with Image.open(path) as image:
        np.testing.assert_array_equal(open_image(image), expected)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_other_formats(kind: str) -> None:
    data = encoded(Image.fromarray(PIXELS), kind)
    np.testing.assert_array_equal(
        open_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    )


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.png' does not exist"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is a folder"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match=r"cannot be opened: .*null"):
        open_image("a\0b")
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(ImageError, match=r"a\.txt' is not an image"):
        open_image(tmp_path / "a.txt")
    with pytest.raises(ImageError, match="given as 0 bytes is not an image"):
        open_image(b"")


def test_postscript_is_not_run() -> None:
    with pytest.raises(ImageError, match="is not an image"):
        open_image(encoded(Image.fromarray(PIXELS), "EPS"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_file(kind: str) -> None:
    data = encoded(Image.fromarray(np.tile(PIXELS, (20, 20, 1))), kind)
    with pytest.raises(ImageError, match=r"damaged|not an image"):
        open_image(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("width", "height"), [(32769, 1), (1, 40000), (8_001, 8_000), (60000, 60000)]
)
def test_too_large_is_said_before_decoding(width: int, height: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="too large"):
            open_image(png_header(width, height))


def test_large_but_allowed_does_not_warn() -> None:
    # Pillow warns of a possible bomb here, and we do not; there are no pixels to decode after that
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="damaged or cut short"):
            open_image(png_header(9_500, 10_000), max_pixels=95_000_000)


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.zeros((0, 5, 3), np.uint8), "is empty"),
        (np.zeros((5, 0), np.uint8), "is empty"),
        (np.zeros((3, 8, 8), np.uint8), "is not an image"),
        (np.zeros((8, 8, 4), np.uint8), "is not an image"),
        (np.zeros((8,), np.uint8), "is not an image"),
        (np.zeros((2, 8, 8, 3), np.uint8), "is not an image"),
        (np.zeros((3, 8, 8), np.float32), "channels come first: give uint8"),
        (np.zeros((8, 8, 3), np.float32), "dtype float32 is not an image; give uint8"),
        (np.broadcast_to(np.zeros(3, np.uint8), (40_000, 2, 3)), "too large"),
    ],
)
def test_unusable_arrays(array: np.ndarray, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        open_image(array)


def test_unusable_objects() -> None:
    with pytest.raises(ImageError, match="cannot be made from list"):
        open_image([[1, 2], [3, 4]])  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="is empty"):
        open_image(Image.new("RGB", (0, 4)))


SAMPLES = [
    encoded(Image.fromarray(PIXELS), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")
]


@settings(max_examples=examples(150), deadline=None)
@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6),
    st.integers(0, 2000),
)
def test_damaged_files_give_pixels_or_an_image_error(
    data: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    damaged = bytearray(data)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    try:
        opened = open_image(bytes(damaged[: max(length, 1)]))
    except ImageError:
        return
    assert opened.dtype == np.uint8
    assert opened.ndim == 3


def _small() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 3)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not an image"):
        open_image(tmp_path / "pipe.png")
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as file:
        file.write(_small())
    assert open_image(f"/dev/fd/{reader}").shape == (3, 2, 3)
    os.close(reader)


def test_the_limit_is_an_option() -> None:
    image = np.zeros((20, 30, 3), np.uint8)
    assert open_image(image, 600).shape == image.shape
    with pytest.raises(ImageError, match=r"at most 599 pixels in all .* max_image_pixels"):
        open_image(image, 599)
    assert GenerationOptions(max_image_pixels=PILLOW_MAX_PIXELS).max_image_pixels > MAX_PIXELS
    with pytest.raises(ParameterError, match="from 1 to 178,956,970"):
        GenerationOptions(max_image_pixels=PILLOW_MAX_PIXELS + 1)
