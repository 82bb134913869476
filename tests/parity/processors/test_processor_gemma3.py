"""Gemma 3's pixels equal transformers', and so do the prompts that its processor writes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from processor_tools import SIZES, sample_image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from lvlm.core.errors import BundleError, ParameterError
from lvlm.runtime.media.images import open_image
from lvlm.runtime.processors import load_processor
from lvlm.runtime.processors.gemma3 import normalise_config

CASES: dict[str, dict[str, Any]] = {
    "small": {"size": {"height": 28, "width": 28}},
    "no square": {"size": {"height": 20, "width": 32}, "resample": 3},
    "other arithmetic": {"size": 30, "rescale_factor": 1 / 127.5, "image_mean": [1.0, 0.5, 0.25]},
    "no arithmetic": {"size": {"height": 9, "width": 9}, "do_rescale": False, "do_normalize": 0},
    "released": {
        "size": {"height": 896, "width": 896},
        "do_convert_rgb": None,
        "do_pan_and_scan": None,
        "pan_and_scan_max_num_crops": None,
        "image_seq_length": 256,
    },
}
NAMED = {"image_processor_type": "Gemma3ImageProcessorFast"}


def config(options: dict[str, Any], tokens: int = 4) -> dict[str, object]:
    return normalise_config({**NAMED, **options}, tokens, "<soft>", "<begin>", "<end>")


@pytest.mark.parametrize("case", CASES)
def test_pixels_equal_transformers(case: str) -> None:
    options = CASES[case]
    theirs = Gemma3ImageProcessorPil(**options)
    # What is in a checkpoint may be short, or have all of it, as transformers writes it today
    ours = load_processor(config(options))
    assert config(options) == config(json.loads(json.dumps(theirs.to_dict())))
    for width, height in SIZES[:: 7 if case == "released" else 1]:
        image = sample_image(width, height)
        expected = theirs(image, return_tensors="np")
        [got] = ours.prepare([open_image(image)])
        pixels = got.arrays["pixel_values"]
        assert pixels.dtype == np.float32
        np.testing.assert_array_equal(pixels, expected["pixel_values"].astype(np.float32))
        assert expected["num_crops"].tolist() == [0]
        assert got.tokens == got.rows == len(got.index) == 4
        assert got.text == "\n\n<begin><soft><soft><soft><soft><end>\n\n"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"image_processor_type": "SiglipImageProcessor"}, "supported are Gemma3ImageProcessor"),
        ({"do_pan_and_scan": True}, "do_pan_and_scan is not supported; set it to false"),
        ({"do_resize": False}, "do_resize"),
        ({"size": {"shortest_edge": 28}}, "size = "),
        ({"image_mean": [0.5, 0.5]}, "mean = "),
    ],
)
def test_what_is_not_supported_is_named(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ParameterError, match=problem):
        config(options)


@pytest.mark.parametrize(
    ("key", "value"), [("image_tokens", 0), ("start", 7), ("size", [28, 28]), ("resample", 6)]
)
def test_a_bundles_config_is_not_trusted(key: str, value: object) -> None:
    good = config({})
    with pytest.raises(BundleError, match=key):
        load_processor({**good, key: value})
    with pytest.raises(BundleError, match="unknown key, 'more'"):
        load_processor({**good, "more": 1})
    with pytest.raises(BundleError, match=f"lacks '{key}'"):
        load_processor({k: v for k, v in good.items() if k != key})
