"""Tiles and their packing equal transformers': LLaVA-NeXT's processor and its model's own code."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anyres_tools import PATCHES, SIDE, model_config, sample_images
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.processing_llava_next import (
    LlavaNextProcessor as TheirProcessor,
)

from lvlm.core.errors import BundleError, ParameterError
from lvlm.runtime.media.images import open_image
from lvlm.runtime.processors import load_processor
from lvlm.runtime.processors.llava_next import normalise_config

GRID = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
WRITTEN: dict[str, dict[str, Any]] = {
    "as usual": {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
    "old": {"size": SIDE, "crop_size": SIDE, "resample": 2},
    "no crop": {
        "size": {"height": SIDE, "width": SIDE},
        "do_center_crop": False,
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.4, 0.3],
    },
    "no arithmetic": {"size": SIDE, "crop_size": SIDE, "do_rescale": False, "do_normalize": False},
}


def written(case: str, grid: list[list[int]] = GRID) -> dict[str, Any]:
    kind = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": grid}
    return kind | WRITTEN[case]


CONFIG = normalise_config(written("as usual"), SIDE, PATCHES)


@pytest.mark.parametrize("case", WRITTEN)
def test_pixels_equal_transformers(case: str) -> None:
    theirs = LlavaNextImageProcessorPil(**WRITTEN[case], image_grid_pinpoints=GRID)
    for preprocessor in (written(case), theirs.to_dict()):
        ours: Any = load_processor(normalise_config(preprocessor, SIDE, PATCHES))
        for image in sample_images():
            (got,) = ours.prepare([open_image(image)])
            expected = theirs(image, return_tensors="np")["pixel_values"][0]
            assert got.arrays["pixel_values"].dtype == np.float32
            np.testing.assert_array_equal(got.arrays["pixel_values"], expected.astype(np.float32))


def packed(config: Any, rows: np.ndarray, units: int, size: tuple[int, int]) -> np.ndarray:
    """What transformers' model makes of the vision tower's rows, the newline first."""
    features = torch.from_numpy(rows[1:]).reshape(units, -1, rows.shape[1])
    found, _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config), [features], [size], "default", torch.from_numpy(rows[0])
    )
    return found[0].numpy()


@settings(max_examples=examples(120), deadline=None)
@given(st.integers(1, 400), st.integers(1, 400))
def test_tokens_equal_what_the_model_packs(height: int, width: int) -> None:
    ours: Any = load_processor(CONFIG)
    (prepared,) = ours.prepare([np.zeros((height, width, 3), np.uint8)])
    rows = np.random.default_rng(0).normal(size=(1 + prepared.rows, 3)).astype(np.float32)
    config = model_config(SIDE, PATCHES, GRID)
    expected = packed(config, rows, prepared.units, (height, width))
    np.testing.assert_array_equal(prepared.features(rows), expected)
    assert prepared.tokens <= ours.tiles.max_tokens
    theirs = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=GRID),
        patch_size=SIDE // PATCHES,
        num_additional_image_tokens=0,
    )
    theirs._get_unpadded_features = lambda *x: TheirProcessor._get_unpadded_features(theirs, *x)
    counted = TheirProcessor._get_number_of_features(theirs, height, width, SIDE, SIDE)
    assert counted == prepared.tokens


def test_the_released_checkpoint() -> None:
    """Counts of LLaVA-1.6 for sizes that its tiles fit exactly, and a screen's."""
    given = {"image_processor_type": "LlavaNextImageProcessor", "crop_size": 336, "size": 336}
    ours: Any = load_processor(normalise_config(given, 336, 24))
    for (height, width), tokens in {
        (672, 672): 576 + 48 * 49,
        (336, 672): 576 + 24 * 49,
        (1008, 336): 576 + 72 * 25,
        (480, 640): 576 + 36 * 49,
    }.items():
        (prepared,) = ours.prepare([np.zeros((height, width, 3), np.uint8)])
        assert prepared.tokens == tokens
    assert ours.tiles.max_tokens == 2928


@settings(max_examples=examples(80), deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([56, 57, 87, 88, 91, 92]))
def test_fewer_tokens(height: int, width: int, most: int) -> None:
    """Images are scaled down to what gives no more, as transformers counts it, too."""
    ours: Any = load_processor(CONFIG | {"max_tokens": most})
    assert ours.tiles.max_tokens <= most
    image = np.zeros((height, width, 3), np.uint8)
    (prepared,) = ours.prepare([image])
    assert prepared.tokens <= most
    rows = np.arange(1 + prepared.rows, dtype=np.float32)[:, None]
    config = model_config(SIDE, PATCHES, GRID)
    expected = packed(config, rows, prepared.units, prepared.size)
    np.testing.assert_array_equal(prepared.features(rows), expected)
    (full,) = load_processor(CONFIG).prepare([image])
    if full.units == prepared.units:
        assert prepared.size == (height, width) or math.prod(prepared.size) <= 48 * 48
    else:
        assert prepared.units < full.units


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"size": 30}, "mixes files of two models"),
        ({"crop_size": {"height": 30, "width": 24}}, "mixes files of two models"),
        ({"image_grid_pinpoints": [[24, 30]]}, "multiples of 24"),
        ({"image_grid_pinpoints": []}, "pairs"),
        ({"image_grid_pinpoints": "anyres"}, "pairs"),
        ({"image_std": [1, 0, 1]}, "std"),
        ({"resample": "bicubic"}, "resample"),
    ],
)
def test_unsupported_checkpoints(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ParameterError, match=problem):
        normalise_config(written("as usual") | change, SIDE, PATCHES)


@pytest.mark.parametrize("key", sorted(CONFIG.keys() - {"name"}))
def test_missing_key(key: str) -> None:
    with pytest.raises(BundleError, match=f"lacks '{key}'"):
        load_processor({k: v for k, v in CONFIG.items() if k != key})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("side", 0),
        ("side", 10**6),
        ("patches", 25),
        ("patches", "4"),
        ("resolutions", [[24]]),
        ("resolutions", [[24, 24]] * 65),
        ("resolutions", [[24, 8208]]),
        ("resolutions", 3),
        ("resample", 6),
        ("rescale_factor", 0),
        ("mean", None),
        ("max_tokens", 55),
        ("max_tokens", 0),
    ],
)
def test_bad_value(key: str, value: object) -> None:
    with pytest.raises(BundleError, match=key):
        load_processor({**CONFIG, key: value})
