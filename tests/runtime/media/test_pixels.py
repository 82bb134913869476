"""Samples of more than 8 bits, and memory while a large image is decoded."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lvlm.core.errors import ImageError
from lvlm.runtime.media.images import open_image

RAMP = np.linspace(0, 65_535, 64 * 64).round().astype(np.uint16).reshape(64, 64)


def saved(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_by_their_range(kind: str) -> None:
    gray = Image.fromarray(RAMP)
    data = saved(gray, kind)
    if kind == "PPM":  # Pillow writes 8 bits
        data = b"P5 64 64 65535\n" + RAMP.astype(">u2").tobytes()
    opened = open_image(data)
    exact = RAMP.astype(float) * 255 / 65_535
    assert np.abs(opened[:, :, 0] - exact).max() <= 0.5
    assert (opened == opened[:, :, :1]).all()


def test_16_bit_pil_image() -> None:
    assert np.abs(open_image(Image.fromarray(RAMP))[:, :, 1] - RAMP / 257).max() <= 0.5


@pytest.mark.parametrize(("mode", "dtype"), [("I;16B", ">u2"), ("I;16L", "<u2"), ("I;16N", "=u2")])
def test_16_bits_in_any_order_of_bytes(mode: str, dtype: str) -> None:
    """Pillow reads a TIFF of a big-endian machine into a mode of its own."""
    image = Image.frombytes(mode, (64, 64), RAMP.astype(dtype).tobytes())
    given = [image, saved(image, "TIFF")] if mode == "I;16B" else [image]
    for source in given:
        assert np.abs(open_image(source)[:, :, 0] - RAMP / 257).max() <= 0.5


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_colors_multiplied_by_their_opacity(mode: str) -> None:
    image = Image.new(mode, (2, 1), (40, 128) if mode == "LA" else (40, 40, 40, 128))
    image.putpixel((1, 0), (0,) * len(mode))
    opened = open_image(image.convert(f"{mode[:-1]}a"))
    assert opened[0, 0].tolist() == pytest.approx([255 - (255 - 40) * 128 / 255] * 3, abs=2)
    assert opened[0, 1].tolist() == [255] * 3  # transparent, not black


def test_transparent_gray_of_16_bits() -> None:
    image = Image.fromarray(RAMP)
    image.info["transparency"] = int(RAMP[1, 1])
    assert (open_image(image)[1, 1] == 255).all()


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=20))
def test_small_values_in_wide_words_stay(values: list[int]) -> None:
    for dtype, mode in ((np.uint16, "I;16"), (np.int32, "I"), (np.float32, "F")):
        if dtype == np.float32 and max(values) <= 1:
            continue  # fractions of white
        image = Image.fromarray(np.array([values], dtype))
        assert image.mode == mode
        assert open_image(image)[0, :, 0].tolist() == values


def test_fractions_of_white() -> None:
    image = Image.fromarray(np.array([[0, 0.25, 0.5, 1]], np.float32))
    assert open_image(image)[0, :, 2].tolist() == [0, 64, 128, 255]
    assert open_image(Image.new("F", (2, 2), 0)).max() == 0


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.array([[70_000, 0]], np.int32), "from 0 to 70000"),
        (np.array([[-1, 3]], np.int32), "from -1 to 3"),
        (np.array([[np.nan, 3]], np.float32), "not finite"),
        (np.array([[np.inf, 3]], np.float32), "not finite"),
        (np.array([[1e9, 3]], np.float32), r"from 3 to 1e\+09"),
    ],
)
def test_without_a_range(array: np.ndarray, problem: str) -> None:
    with pytest.raises(ImageError, match=f"the PIL image has samples .*{problem}"):
        open_image(Image.fromarray(array))


@pytest.mark.parametrize("turn", range(9))
def test_many_bands_turned(turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (37, 23, 3), np.uint8))
    image.getexif()[0x0112] = turn
    monkeypatch.setattr("lvlm.runtime.media.pixels.BAND", 23 * 5)
    opened = open_image(image)
    np.testing.assert_array_equal(opened, np.asarray(ImageOps.exif_transpose(image)))
    assert opened.flags.c_contiguous


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "CMYK", "1", "I", "F"])
def test_many_bands(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (37, 23, 4), np.uint8)
    image = Image.fromarray(pixels).convert(
        "RGB" if mode in ("P", "CMYK", "1", "I", "F") else "RGBA"
    )
    image = image.convert(mode)
    whole = open_image(image)
    monkeypatch.setattr("lvlm.runtime.media.pixels.BAND", 23 * 5)
    np.testing.assert_array_equal(open_image(image), whole)


def test_memory_follows_the_pixels() -> None:
    """36 megapixels with transparency, in a process of its own: 7 bytes a pixel, not 19."""
    file = io.BytesIO()
    Image.new("RGBA", (6_000, 6_000), (10, 20, 30, 200)).save(file, "PNG", compress_level=1)
    program = (
        "import resource, sys; from lvlm.runtime.media.images import open_image\n"
        "from PIL import PngImagePlugin\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert open_image(sys.stdin.buffer).shape == (6000, 6000, 3)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=file.getvalue(), capture_output=True, check=True
    )
    assert int(done.stdout) * 1024 < 36e6 * 9
