"""Pixtral's patches and the tokens between its rows equal transformers'."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processor_tools import SIZES, sample_image
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.models.pixtral.image_processing_pil_pixtral import (
    PixtralImageProcessorPil,
    get_resize_output_image_size,
)

from lvlm.core.errors import BundleError, ImageError, ParameterError
from lvlm.runtime.media.images import open_image
from lvlm.runtime.processors import load_processor
from lvlm.runtime.processors.pixtral import (
    PixtralProcessor,
    max_tokens,
    normalise_config,
    with_max_tokens,
)

NAMED = {"image_processor_type": "PixtralImageProcessor"}
WORDS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
SMALL: dict[str, Any] = {"size": {"longest_edge": 96}}
# Options of the image processor, patch and merge of the processor
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "patches": (SMALL, 16, 1),
    "merged two by two": (SMALL, 8, 2),
    "an edge of no whole tokens": ({"size": {"longest_edge": 75}}, 5, 3),
    "an edge of less than a token": ({"size": {"longest_edge": 9}}, 14, 2),
    "bilinear, other arithmetic": (
        SMALL
        | {"resample": 2, "rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": [1, 2, 3]},
        16,
        1,
    ),
    "no arithmetic": (SMALL | {"do_rescale": False, "do_normalize": False}, 16, 1),
    "mistral small": ({"size": {"longest_edge": 1540}}, 14, 2),
}


def config(options: dict[str, Any], patch: int = 16, merge: int = 1) -> dict[str, object]:
    return normalise_config({**NAMED, **options}, patch, merge, *WORDS)


# The sizes that it scales an image [3,H,W] to
theirs = partial(get_resize_output_image_size, input_data_format="channels_first")
Written = Callable[[tuple[int, int], int, int], str]


@pytest.fixture(scope="module")
def written() -> Written:
    """What transformers' PixtralProcessor writes for an image of a size. Its module imports that of
    the image processor which needs torchvision; the other one has the function that it asks for."""
    needs, name = (
        f"transformers.models.pixtral.{part}_pixtral" for part in ("image_processing", "processing")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, needs, image_processing_pil_pixtral)
        module: ModuleType = importlib.import_module(name)
    sys.modules.pop(name)

    def write(size: tuple[int, int], patch_size: int, merge: int) -> str:
        own = SimpleNamespace(
            patch_size=patch_size,
            spatial_merge_size=merge,
            image_token=WORDS[0],
            image_break_token=WORDS[1],
            image_end_token=WORDS[2],
        )
        found = module.PixtralProcessor.replace_image_token(own, {"image_sizes": [size]}, 0)
        return str(found)

    return write


def joined(pixels: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The image [3,H,W] of patches [V,p,3*side*side] at their rows and columns [V,p,2]."""
    side = round((pixels.shape[2] / 3) ** 0.5)
    rows, columns = places.max((0, 1)) + 1
    image = np.full((3, rows * side, columns * side), np.nan, np.float32)
    for values, (row, column) in zip(
        pixels.reshape(-1, pixels.shape[2]), places.reshape(-1, 2), strict=True
    ):
        top, left = row * side, column * side
        image[:, top : top + side, left : left + side] = values.reshape(3, side, side)
    return image


@pytest.mark.parametrize("case", CASES)
def test_patches_and_words_equal_transformers(case: str, written: Written) -> None:
    options, patch, merge = CASES[case]
    # The processor gives the side of a token to its image processor, whose own is not asked
    processor = PixtralImageProcessorPil(**options, patch_size=patch * merge)
    ours = load_processor(config(options, patch, merge))
    assert config(options, patch, merge) == config(
        json.loads(json.dumps(processor.to_dict())), patch, merge
    )
    seen = set()
    sizes = [(31, 97), (1600, 700)] if case == "mistral small" else SIZES
    for width, height in sizes:
        image = sample_image(width, height)
        shape = np.broadcast_to(np.uint8(0), (3, height, width))
        if 0 in theirs(shape, options["size"]["longest_edge"], patch * merge):
            with pytest.raises(ImageError, match="too long and thin"):
                ours.prepare([open_image(image)])
            continue
        expected = processor(image, return_tensors="np")
        [got] = ours.prepare([open_image(image)])
        pixels, places = got.arrays["pixel_values"], got.arrays["position_ids"]
        assert (pixels.dtype, pixels.shape[1]) == (np.float32, merge**2)
        own = joined(pixels, places)
        np.testing.assert_array_equal(own, expected["pixel_values"][0].astype(np.float32))
        assert list(own.shape[1:]) == list(expected["image_sizes"][0])
        assert got.text == written(own.shape[1:], patch, merge)
        assert got.tokens == got.rows == got.units == got.text.count(WORDS[0])
        assert got.tokens <= max_tokens(config(options, patch, merge))
        # A token's patches are its square of the image, tokens row by row
        assert got.grid is not None
        np.testing.assert_array_equal(got.grid, np.arange(got.tokens).reshape(got.grid.shape))
        for token, (row, column) in enumerate(np.ndindex(got.grid.shape)):
            corner = [row * merge, column * merge]
            square = [[y, x] for y in range(merge) for x in range(merge)]
            np.testing.assert_array_equal(places[token], np.array(square) + corner)
        seen.add(got.grid.shape)
    assert len(seen) > 1 or case == "an edge of less than a token"


@settings(max_examples=examples(300))
@given(
    st.integers(1, 20_000),
    st.integers(1, 20_000),
    st.integers(1, 999),
    st.integers(1, 40),
    st.integers(1, 3),
)
def test_sizes_equal_transformers(
    height: int, width: int, longest: int, patch: int, merge: int
) -> None:
    """Of every image, without its pixels; and the most tokens hold for it."""
    own = config({"size": {"longest_edge": longest}}, patch, merge)
    ours, side = PixtralProcessor(own), patch * merge
    assert np.prod(ours.grid(longest, longest)) == max_tokens(own)
    shape = np.broadcast_to(np.uint8(0), (3, height, width))
    expected = theirs(shape, longest, side)
    if 0 in expected:
        with pytest.raises(ImageError, match="too long and thin"):
            ours.grid(height, width)
        return
    rows, columns = ours.grid(height, width)
    assert (rows * side, columns * side) == expected
    assert rows * columns <= max_tokens(own)


@settings(max_examples=examples(150))
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.integers(1, 150),
    st.integers(1, 300),
    st.integers(1, 3),
)
def test_a_lower_bound_is_a_shorter_longest_edge(
    height: int, width: int, longest: int, tokens: int, patch: int
) -> None:
    """The longest with which the image has few enough tokens; one that has, is as before."""
    full = config({"size": {"longest_edge": longest}}, patch)
    bounded = with_max_tokens(full, tokens)
    assert max_tokens(bounded) == min(tokens, max_tokens(full))
    shape = np.broadcast_to(np.uint8(0), (3, height, width))
    sizes = (theirs(shape, edge, patch) for edge in range(longest, 0, -1))
    best = next((high, wide) for high, wide in sizes if high * wide <= patch**2 * tokens)
    if 0 in best:
        with pytest.raises(ImageError, match="too long and thin"):
            PixtralProcessor(bounded).grid(height, width)
    else:
        rows, columns = PixtralProcessor(bounded).grid(height, width)
        assert (patch * rows, patch * columns) == best


def test_several_images_are_each_on_their_own() -> None:
    processor = load_processor(config(SMALL, 8, 2))
    images = [open_image(sample_image(width, height)) for width, height in SIZES[4:14]]
    for one, image in zip(processor.prepare(images), images, strict=True):
        [alone] = processor.prepare([image])
        assert one.digest() == alone.digest()
        assert one.text == alone.text


def test_an_image_that_would_vanish_is_refused_with_its_size() -> None:
    image = np.zeros((1, 200, 3), np.uint8)
    with pytest.raises(ImageError, match=r"200 x 1 pixels \(aspect ratio 200:1\).*crop it first"):
        load_processor(config(SMALL)).prepare([image])
    with pytest.raises(ValueError, match="height=0, width=96"):
        PixtralImageProcessorPil(**SMALL)(Image.fromarray(image))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "supported are PixtralImageProcessor"),
        ({"do_resize": False}, "do_resize"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"size": {"height": 96, "width": 96}}, "size = .*give a longest_edge"),
        ({"size": 96}, "size = 96"),
        ({"size": {"longest_edge": 0}}, "longest_edge = 0"),
        ({"size": {"longest_edge": "96"}}, "longest_edge = '96'"),
        ({"image_std": 0}, "std = "),
    ],
)
def test_what_is_not_supported_is_named(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ParameterError, match=problem):
        config(options)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patch", 0),
        ("merge", True),
        ("longest_edge", 9_000),
        ("max_tokens", None),
        ("row_end", None),
        ("image_end", 3),
    ],
)
def test_a_bundles_config_is_not_trusted(key: str, value: object) -> None:
    good = config({})
    with pytest.raises(BundleError, match=key):
        load_processor({**good, key: value})
    with pytest.raises(BundleError, match="unknown key, 'more'"):
        load_processor({**good, "more": 1})
    with pytest.raises(BundleError, match=f"lacks '{key}'"):
        load_processor({k: v for k, v in good.items() if k != key})
