"""Tiles, interpolation and packing equal transformers': LLaVA-OneVision's processor and model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anyres_tools import model_config, sample_images
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from lvlm.core.errors import BundleError, ImageError, ParameterError
from lvlm.runtime.media.images import open_image
from lvlm.runtime.processors import load_processor
from lvlm.runtime.processors.llava_onevision import normalise_config, shrink

SIDE, PATCHES, MOST = 20, 5, 2
GRID = [[high, wide] for high in range(20, 81, 20) for wide in range(20, 81, 20)]
GIVEN: dict[str, Any] = {
    "image_processor_type": "LlavaOnevisionImageProcessor",
    "size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.5, 0.25, 0.75],
    "image_std": [0.5, 0.4, 0.3],
    "image_grid_pinpoints": GRID,
}
CONFIG = normalise_config(GIVEN, SIDE, PATCHES, MOST)


def test_pixels_equal_transformers() -> None:
    theirs = LlavaOnevisionImageProcessorPil(
        **{k: v for k, v in GIVEN.items() if k != "image_processor_type"}
    )
    for preprocessor in (GIVEN, theirs.to_dict()):
        ours: Any = load_processor(normalise_config(preprocessor, SIDE, PATCHES, MOST))
        images = sample_images()
        for image in images:
            (got,) = ours.prepare([open_image(image)])
            expected = theirs(image, return_tensors="np")["pixel_values"][0]
            np.testing.assert_array_equal(got.arrays["pixel_values"], expected.astype(np.float32))
        together = ours.prepare([open_image(image) for image in images])
        expected = theirs([images], return_tensors="np")["pixel_values"]
        for got, tile in zip(together, expected, strict=True):
            np.testing.assert_array_equal(got.arrays["pixel_values"], tile.astype(np.float32))


def packed(rows: np.ndarray, units: int, size: tuple[int, int], grid: Any) -> np.ndarray:
    """What transformers' model makes of the vision tower's rows, the newline first."""
    features = torch.from_numpy(rows[1:]).reshape(units, -1, rows.shape[1])
    found, _ = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=model_config(SIDE, PATCHES, grid)),
        [features],
        [size],
        torch.from_numpy(rows[0]),
        f"anyres_max_{MOST}",
    )
    return found[0].numpy()


@settings(max_examples=examples(120), deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([None, 55, 60, 80, 90]),
    st.booleans(),
)
def test_tokens_equal_what_the_model_packs(
    height: int, width: int, most: int | None, alone: bool
) -> None:
    ours: Any = load_processor(CONFIG | {"max_tokens": most})
    images = [np.zeros((height, width, 3), np.uint8)] * (1 if alone else 2)
    prepared = ours.prepare(images)[0]
    assert prepared.tokens <= ours.tiles.max_tokens <= (most or 10**9)
    rows = np.random.default_rng(0).normal(size=(1 + prepared.rows, 3)).astype(np.float32)
    expected = packed(rows, prepared.units, prepared.size, GRID)
    # A weight has the rounding of a coordinate of up to some forty patches.
    np.testing.assert_allclose(prepared.features(rows), expected, atol=2e-5)
    assert (prepared.weight is not None) == (
        alone and prepared.tokens > 0 and mixed(expected, rows)
    )
    if not alone:
        assert prepared.tokens == PATCHES**2 + 1


def mixed(features: np.ndarray, rows: np.ndarray) -> bool:
    """Some feature is no row as it is."""
    known = {row.tobytes() for row in rows}
    return any(feature.tobytes() not in known for feature in features)


@settings(max_examples=examples(60), deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_shrinking_equals_interpolate(lines: int, columns: int, data: Any) -> None:
    shape = (data.draw(st.integers(1, lines)), data.draw(st.integers(1, columns)))
    values = np.random.default_rng(0).normal(size=(lines, columns)).astype(np.float32)
    index, weight = shrink(np.arange(lines * columns).reshape(lines, columns), *shape)
    grid = torch.from_numpy(values)[None, None]
    expected = torch.nn.functional.interpolate(grid, shape, mode="bilinear")[0, 0].numpy()
    np.testing.assert_allclose((values.reshape(-1)[index] * weight).sum(-1), expected, atol=1e-5)
    assert weight.dtype == np.float32
    np.testing.assert_allclose(weight.sum(-1), 1, atol=1e-6)


def test_the_released_checkpoint() -> None:
    """384 pixels in patches of 14: 27 along a side, 9 tiles' worth at most."""
    given = {"image_processor_type": "LlavaOnevisionImageProcessor"}
    ours: Any = load_processor(normalise_config(given, 384, 27, 9))
    (prepared,) = ours.prepare([np.zeros((384, 384, 3), np.uint8)])
    assert prepared.tokens == 729 + 27 * 28
    (prepared,) = ours.prepare([np.zeros((2304, 2304, 3), np.uint8)])
    assert (prepared.units, prepared.tokens) == (37, 729 + 81 * 82)
    assert [p.tokens for p in ours.prepare([np.zeros((9, 900, 3), np.uint8)] * 2)] == [730] * 2


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image_processor_type": "LlavaNextImageProcessor"}, "LlavaNextImageProcessor"),
        ({"do_resize": False}, "do_resize"),
        ({"size": {"height": 24, "width": 24}}, "mixes files of two models"),
        ({"image_grid_pinpoints": [[24, 30]]}, "multiples of 20"),
        ({"image_mean": "grey"}, "image_mean"),
    ],
)
def test_unsupported_checkpoints(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ParameterError, match=problem):
        normalise_config(GIVEN | change, SIDE, PATCHES, MOST)


@pytest.mark.parametrize(
    ("key", "value"), [("most_tiles", 0), ("pad_value", [0, 0]), ("max_tokens", 54)]
)
def test_bad_value(key: str, value: object) -> None:
    with pytest.raises(BundleError, match=key):
        load_processor({**CONFIG, key: value})
    with pytest.raises(BundleError, match=f"lacks '{key}'"):
        load_processor({k: v for k, v in CONFIG.items() if k != key})


def test_a_long_image_among_others_is_refused() -> None:
    with pytest.raises(ImageError, match="aspect ratio 20000:1"):
        load_processor(CONFIG).prepare([np.zeros((1, 20_000, 3), np.uint8)] * 2)
