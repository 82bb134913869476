"""InternVL's tiles equal transformers', and so do the prompts that its processor writes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from processor_tools import SIZES, sample_image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from lvlm.core.errors import BundleError, ParameterError
from lvlm.runtime.media.images import open_image
from lvlm.runtime.processors import load_processor
from lvlm.runtime.processors.internvl import max_tokens, normalise_config, with_max_tokens

CASES: dict[str, dict[str, Any]] = {
    "small tiles": {"size": {"height": 28, "width": 28}},
    "one tile": {"size": {"height": 28, "width": 28}, "max_patches": 1},
    "two to seven tiles": {"size": 30, "min_patches": 2, "max_patches": 7},
    "tiles that are not square": {"size": {"height": 20, "width": 32}, "max_patches": 9},
    "bilinear, other arithmetic": {
        "size": {"height": 28, "width": 28},
        "resample": 2,
        "rescale_factor": 1 / 127.5,
        "image_mean": [1.0, 0.5, 0.25],
        "image_std": 1.0,
    },
    "no arithmetic": {
        "size": {"height": 28, "width": 28},
        "do_rescale": False,
        "do_normalize": False,
    },
    "released": {
        "size": {"height": 448, "width": 448},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "crop_to_patches": False,
    },
}
NAMED = {"image_processor_type": "GotOcr2ImageProcessorFast"}


def config(options: dict[str, Any]) -> dict[str, object]:
    return normalise_config({**NAMED, **options}, 4, "<IMG_CONTEXT>", "<img>", "</img>")


@pytest.mark.parametrize("case", CASES)
def test_tiles_equal_transformers(case: str) -> None:
    options = CASES[case]
    theirs = GotOcr2ImageProcessorPil(**{**options, "crop_to_patches": True})
    # What is in a checkpoint may be short, or have all of it, as transformers writes it today
    ours = load_processor(config(options))
    assert config(options) == config(json.loads(json.dumps(theirs.to_dict())))
    seen = set()
    for width, height in SIZES[:: 5 if case == "released" else 1]:
        image = sample_image(width, height)
        expected = theirs(image, return_tensors="np")
        [got] = ours.prepare([open_image(image)])
        tiles = int(expected["num_patches"][0])
        pixels = got.arrays["pixel_values"]
        assert pixels.dtype == np.float32
        np.testing.assert_array_equal(pixels, expected["pixel_values"].astype(np.float32))
        assert got.tokens == got.rows == 4 * tiles <= max_tokens(config(options))
        assert got.text == f"<img>{'<IMG_CONTEXT>' * 4 * tiles}</img>"
        assert (got.index == np.arange(4 * tiles)[:, None]).all()
        seen.add(tiles)
    assert len(seen) > 2 or case in ("one tile", "released")


def test_several_images_are_each_on_their_own() -> None:
    processor = load_processor(config({"size": {"height": 28, "width": 28}}))
    images = [open_image(sample_image(width, height)) for width, height in SIZES[4:9]]
    for one, image in zip(processor.prepare(images), images, strict=True):
        [alone] = processor.prepare([image])
        np.testing.assert_array_equal(one.arrays["pixel_values"], alone.arrays["pixel_values"])
        assert one.digest() == alone.digest()


def test_the_grid_depends_on_the_size_only() -> None:
    processor = load_processor(config({"size": {"height": 28, "width": 28}}))
    for width, height in SIZES:
        black = np.zeros((height, width, 3), np.uint8)
        noise = open_image(sample_image(width, height))
        counts = {p.tokens for p in processor.prepare([black, noise])}
        assert len(counts) == 1


@pytest.mark.parametrize(("tokens", "tiles"), [(4, 1), (8, 1), (12, 2), (51, 11), (52, 12)])
def test_fewer_tiles_for_a_bound_of_tokens(tokens: int, tiles: int) -> None:
    bounded = with_max_tokens(config({"size": 28, "min_patches": 3}), tokens)
    assert bounded is not None
    assert bounded["max_tiles"] == tiles
    assert max_tokens(bounded) <= tokens
    processor = load_processor(bounded)
    most = max(p.tokens for w, h in SIZES for p in processor.prepare([np.zeros((h, w, 3), "u1")]))
    assert most <= max_tokens(bounded)


def test_a_bound_below_one_tile() -> None:
    assert with_max_tokens(config({"size": 28}), 3) is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "supported are GotOcr2ImageProcessor"),
        ({"do_pad": True}, "do_pad"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"do_resize": False, "max_patches": 1}, "do_resize"),
        ({"max_patches": 0}, "max_tiles = 0"),
        ({"min_patches": 13}, "min_tiles = 13"),
        ({"size": {"shortest_edge": 28}}, "size = "),
        ({"size": {"height": 4000, "width": 4000}}, "max_tiles = 12"),
        ({"image_mean": [0.5, 0.5]}, "mean = "),
    ],
)
def test_what_is_not_supported_is_named(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ParameterError, match=problem):
        config(options)


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_tiles", 65), ("min_tiles", True), ("start", 7), ("tile_tokens", 0), ("size", [28, 28])],
)
def test_a_bundles_config_is_not_trusted(key: str, value: object) -> None:
    good = config({})
    with pytest.raises(BundleError, match=key):
        load_processor({**good, key: value})
    with pytest.raises(BundleError, match="unknown key, 'more'"):
        load_processor({**good, "more": 1})
    with pytest.raises(BundleError, match=f"lacks '{key}'"):
        load_processor({k: v for k, v in good.items() if k != key})
