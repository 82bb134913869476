"""PaliGemma's pixels equal transformers', and its texts those of the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from processor_tools import SIZES, sample_image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lvlm.core.errors import BundleError
from lvlm.runtime.media.images import open_image
from lvlm.runtime.processors import llava, load_processor
from lvlm.runtime.processors.paligemma import PaliGemmaProcessor

NAMED = {"image_processor_type": "SiglipImageProcessor", "image_seq_length": 256}
CASES: dict[str, dict[str, Any]] = {
    "small": {"size": {"height": 28, "width": 28}},
    "released": {"size": {"height": 224, "width": 224}, "do_convert_rgb": None},
}


def config(options: dict[str, Any]) -> dict[str, object]:
    pixels = llava.normalise_config({**NAMED, **options}, 4)
    return {"name": "paligemma", "pixels": pixels, "image_token": "<image>", "begin": "<bos>"}


@pytest.mark.parametrize("case", CASES)
def test_pixels_equal_transformers(case: str) -> None:
    theirs, ours = SiglipImageProcessorPil(**CASES[case]), load_processor(config(CASES[case]))
    for width, height in SIZES[:: 5 if case == "released" else 1]:
        image = sample_image(width, height)
        expected = theirs(image, return_tensors="np")["pixel_values"]
        [got] = ours.prepare([open_image(image)])
        np.testing.assert_array_equal(got.arrays["pixel_values"], expected)
        assert got.tokens == got.rows == 4
        assert got.text is None


def test_texts() -> None:
    processor = PaliGemmaProcessor(config(CASES["small"]))
    for prompt, images, expected in (
        ("Why?", 0, "<bos>Why?\n"),
        ("Why?", 2, "<image><image><bos>Why?\n"),
        ("<image>Why?", 1, "<image><bos>Why?\n"),
        ("<image> a <image>b", 2, "<image> a <image><bos>b\n"),
    ):
        assert processor.prompt_text(prompt, images) == expected


@pytest.mark.parametrize(
    ("key", "value"), [("image_token", 7), ("begin", None), ("pixels", []), ("pixels", {})]
)
def test_a_bundles_config_is_not_trusted(key: str, value: object) -> None:
    good = config(CASES["small"])
    with pytest.raises(BundleError, match="lacks" if value == {} else key):
        load_processor({**good, key: value})
    with pytest.raises(BundleError, match="unknown key, 'more'"):
        load_processor({**good, "more": 1})
    with pytest.raises(BundleError, match=f"lacks '{key}'"):
        load_processor({k: v for k, v in good.items() if k != key})
