"""The preprocessing equals transformers' PIL processor, and its tokens never exceed their bound."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from lvlm.core.errors import BundleError, ImageError, ParameterError
from lvlm.runtime.media.images import open_image
from lvlm.runtime.processors import load_processor
from lvlm.runtime.processors.qwen_vl import QwenProcessor, bounded_config, normalise_config

SIZES = [(1, 1), (1, 2), (3, 1), (28, 28), (27, 29), (42, 14), (56, 56), (57, 55), (64, 48)]
SIZES += [(31, 97), (333, 500), (500, 333), (1, 200), (200, 1), (1000, 5), (13, 2600), (900, 20)]
SIZES += [(20, 1400), (2500, 1900)]
KIND = "Qwen2VLImageProcessor"


def sample_images() -> list[Image.Image]:
    """Sizes (width, height), then kinds of images that need a conversion."""
    rng = np.random.default_rng(0)
    plain = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in SIZES]
    rgb = plain[SIZES.index((31, 97))]
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(rng.integers(0, 256, (97, 31), np.uint8)))
    return [*plain, rgba, rgb.convert("L"), rgb.quantize(16)]


CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "small": {"min_pixels": 3136, "max_pixels": 28 * 28 * 20},
    "by size": {"size": {"shortest_edge": 28 * 28 * 6, "longest_edge": 28 * 28 * 9}},
    "other patches": {
        "patch_size": 10,
        "merge_size": 3,
        "temporal_patch_size": 1,
        "min_pixels": 900,
        "max_pixels": 90_000,
        "resample": 2,
    },
    "other arithmetic": {
        "max_pixels": 28 * 28 * 20,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "rescale_factor": 1 / 127.5,
    },
    "no arithmetic": {"max_pixels": 15_680, "do_rescale": False, "do_normalize": False},
}


@pytest.mark.parametrize("case", CASES)
def test_patches_equal_transformers(case: str) -> None:
    theirs = Qwen2VLImageProcessorPil(**CASES[case])
    written = {"image_processor_type": KIND, **CASES[case]}
    patch, merge = theirs.patch_size, theirs.merge_size
    # What is in a checkpoint may be short, or have all of it, as transformers writes it today
    for preprocessor, images in (
        (written, sample_images()),
        (theirs.to_dict(), sample_images()[2::6]),
    ):
        config = normalise_config(preprocessor, window=3, table=48)
        got = load_processor(config).prepare([open_image(image) for image in images])
        for image, prepared in zip(images, got, strict=True):
            expected = theirs(image)
            pixels = prepared.arrays["pixel_values"]
            assert pixels.dtype == np.float32
            np.testing.assert_array_equal(
                pixels.reshape(-1, pixels.shape[2]), expected["pixel_values"].astype(np.float32)
            )
            (grid,) = expected["image_grid_thw"].tolist()
            assert prepared.tokens == prepared.units == prepared.rows == np.prod(grid) // merge**2
            assert prepared.tokens <= config["max_tokens"]  # type: ignore[operator]
            thw = torch.tensor([grid])
            places = get_vision_position_ids(thw, merge).numpy()
            np.testing.assert_array_equal(prepared.arrays["position_ids"].reshape(-1, 2), places)
            index, lengths = get_vision_window_index(thw, merge, 3 * merge * patch, patch)
            window = prepared.arrays["window"]
            np.testing.assert_array_equal(window[window >= 0], index.numpy())
            tokens = (window >= 0).sum(1).cumsum() * merge**2
            np.testing.assert_array_equal(tokens, lengths.numpy()[1:])
            found = window.ravel()[prepared.arrays["place"]]
            np.testing.assert_array_equal(found, np.arange(prepared.tokens))
            learned, share = get_vision_interpolation_indices_and_weights(
                thw, 48, align_corners=True, spatial_merge_size=merge
            )
            assert prepared.arrays["share"].dtype == np.float32
            # Where a share is nothing, whose it is does not matter
            mine = prepared.arrays["learned"].reshape(-1, 4)
            weight = prepared.arrays["share"].reshape(-1, 4)
            np.testing.assert_allclose(weight, share.numpy(), atol=1e-6)
            np.testing.assert_array_equal(mine, learned.numpy())


def test_positions_of_an_image() -> None:
    """Two rows of three tokens: all at one time; what follows is as far on as the longer side."""
    processor = load_processor(normalise_config({"image_processor_type": KIND}))
    (prepared,) = processor.prepare([np.zeros((56, 84, 3), np.uint8)])
    assert prepared.offsets is not None
    assert prepared.offsets.tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]
    assert (prepared.span, prepared.text, prepared.weight) == (3, None, None)
    assert set(prepared.arrays) == {"pixel_values", "position_ids"}  # nothing else was asked for


@settings(max_examples=examples(300), deadline=None)
@given(
    st.integers(1, 30_000),
    st.integers(1, 30_000),
    st.sampled_from([784, 3136, 40_000, 200_000]),
    st.sampled_from([1, 1.5, 4, 100]),
)
def test_grids_equal_transformers_and_stay_within_the_bound(
    height: int, width: int, min_pixels: int, times: float
) -> None:
    max_pixels = int(min_pixels * times)
    config = normalise_config(
        {"image_processor_type": KIND, "min_pixels": min_pixels, "max_pixels": max_pixels}
    )
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ImageError, match="too long and thin"):
            QwenProcessor(config).grid(height, width)
        return
    rows, columns = QwenProcessor(config).grid(height, width)
    assert (rows * 28, columns * 28) == smart_resize(height, width, 28, min_pixels, max_pixels)


@settings(max_examples=examples(300), deadline=None)
@given(st.integers(1, 5_000), st.integers(1, 5_000), st.integers(4, 400))
def test_a_lower_bound_holds_and_refuses_only_long_and_thin_images(
    height: int, width: int, tokens: int
) -> None:
    full = normalise_config({"image_processor_type": KIND})
    bounded = bounded_config(full, tokens)
    assert bounded["max_tokens"] == tokens
    ratio = max(height, width) / min(height, width)
    try:
        rows, columns = QwenProcessor(bounded).grid(height, width)
    except ImageError:
        assert ratio > min(200, tokens / 2)
        return
    assert rows * columns <= tokens


def test_a_long_and_thin_image_is_refused_with_its_size() -> None:
    processor = load_processor(normalise_config({"image_processor_type": KIND}))
    with pytest.raises(ImageError, match=r"201 x 1 pixels \(aspect ratio 201:1\)"):
        processor.prepare([np.zeros((1, 201, 3), np.uint8)])
    with pytest.raises(ValueError, match="absolute aspect ratio"):
        Qwen2VLImageProcessorPil()(Image.new("RGB", (201, 1)))


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor' is not supported"),
        ({"do_resize": False}, "without do_resize is not supported"),
        ({"patch_size": [14, 14]}, "patch = \\[14, 14\\]"),
        ({"max_pixels": 100}, "min_pixels = 3136"),
        ({"image_std": [0, 1, 1]}, "std = "),
    ],
)
def test_other_options_of_a_checkpoint_are_refused(option: dict[str, Any], match: str) -> None:
    with pytest.raises(ParameterError, match=match):
        normalise_config({"image_processor_type": KIND, **option})


@pytest.mark.parametrize(
    "change",
    [
        {"patch": 0},
        {"merge": True},
        {"frames": "2"},
        {"min_pixels": 10**7},
        {"max_tokens": None},
        {"window": 0},
        {"table": "48"},
        {"resample": 9},
        {"mean": [1]},
        {"more": 1},
    ],
)
def test_a_bundle_with_another_config_is_refused(change: dict[str, Any]) -> None:
    config = {**normalise_config({"image_processor_type": KIND}), **change}
    with pytest.raises(BundleError, match="processor config"):
        load_processor(config)
    with pytest.raises(BundleError, match="lacks"):
        load_processor({k: v for k, v in config.items() if k not in (*change, "std")})


def test_needs_no_torch() -> None:
    config = json.dumps(normalise_config({"image_processor_type": KIND}))
    code = f"""
import json, sys
import numpy as np
from lvlm.runtime.processors import load_processor
load_processor(json.loads('''{config}''')).prepare([np.zeros((40, 50, 3), np.uint8)])
assert not {{"torch", "transformers", "onnx"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
