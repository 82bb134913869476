"""LFM2-VL's tiles, thumbnails, native sizes and the words between them equal transformers'."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from processor_tools import SIZES, sample_image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.models.lfm2_vl.processing_lfm2_vl import Lfm2VlProcessor

from lvlm.core.errors import BundleError, ImageError, ParameterError
from lvlm.runtime.media.images import open_image
from lvlm.runtime.processors import load_processor
from lvlm.runtime.processors.lfm2_vl import (
    max_parts,
    max_tokens,
    normalise_config,
    with_max_tokens,
)

NAMED = {"image_processor_type": "Lfm2VlImageProcessorFast"}
SMALL = {"tile_size": 32, "encoder_patch_size": 8, "min_image_tokens": 2, "max_image_tokens": 6}
CASES: dict[str, dict[str, Any]] = {
    "tiles": SMALL,
    "few tiles, three patches a side": {
        "downsample_factor": 3,
        "encoder_patch_size": 5,
        "tile_size": 30,
        "max_tiles": 3,
        "min_image_tokens": 1,
        "max_image_tokens": 9,
        "max_pixels_tolerance": 1.25,
    },
    "not split": SMALL | {"do_image_splitting": False},
    "no thumbnail, other arithmetic": SMALL
    | {"use_thumbnail": False, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.7]},
    "no arithmetic": SMALL | {"do_rescale": False, "do_normalize": False},
}
MARKS = ("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
LEVEL = 2 / 255 + 1e-6  # of pixels in -1 to 1


def config(options: dict[str, Any], *, named: bool = True) -> dict[str, object]:
    return normalise_config({**NAMED, **options}, "<image>", MARKS if named else None)


@pytest.fixture(scope="module")
def theirs() -> Iterator[Callable[..., dict[str, Any]]]:
    """What transformers' image processor makes of an image. It needs torchvision, whose resize of
    bytes is torch's own and whose normalisation is two operations: both stand in for it."""

    def resize(_: Any, image: torch.Tensor, size: Any, **__: Any) -> torch.Tensor:
        shape = size.height, size.width
        found: torch.Tensor = torch.nn.functional.interpolate(
            image, shape, mode="bilinear", antialias=True
        )
        return found

    def normalize(_: Any, image: torch.Tensor, mean: Any, std: Any, **__: Any) -> torch.Tensor:
        mean, std = (torch.as_tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))
        return image.float().sub(mean).div(std)

    names = [f"torchvision{rest}" for rest in ("", ".transforms", ".transforms.v2")]
    name = "transformers.models.lfm2_vl.image_processing_lfm2_vl"
    with pytest.MonkeyPatch.context() as patch:
        for each in names:
            patch.setitem(sys.modules, each, ModuleType(each))
        patch.setattr(sys.modules[names[2]], "functional", None, raising=False)
        patch.delitem(sys.modules, name, raising=False)
        kind = importlib.import_module(name).Lfm2VlImageProcessor
        patch.delitem(sys.modules, name)
        patch.setattr(TorchvisionBackend, "resize", resize)
        patch.setattr(TorchvisionBackend, "normalize", normalize)
        defaults = {
            key: getattr(kind, key) for key in dir(kind) if not callable(getattr(kind, key))
        }

        def made(image: np.ndarray, **options: Any) -> dict[str, Any]:
            given = defaults | options
            for name in ("image_mean", "image_std"):
                given[name] = tuple(given[name])
            given |= {"return_row_col_info": True, "return_tensors": None, "disable_grouping": None}
            pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
            found: dict[str, Any] = kind._preprocess(kind.__new__(kind), [pixels], **given)
            return found

        yield made


def in_order(prepared: Any, part: int) -> np.ndarray:
    """The patches of a part [n,d] row by row, the padding behind them."""
    pixels = prepared.arrays["pixel_values"][part]
    pixels = pixels.reshape(-1, pixels.shape[-1])
    row, column = prepared.arrays["position_ids"][part].reshape(-1, 2).T
    there = row >= 0
    found = np.zeros_like(pixels)
    found[row[there] * prepared.arrays["sides"][part, 1] + column[there]] = pixels[there]
    return found


@pytest.mark.parametrize("case", CASES)
def test_parts_and_words_equal_transformers(case: str, theirs: Callable[..., Any]) -> None:
    """A level of 256 apart, for one in a hundred pixels at most: theirs are scaled by torch."""
    options = CASES[case]
    ours, level = load_processor(config(options)), LEVEL
    if "image_std" in options:
        level /= 2 * min(options["image_std"])
    level = 1.0 if "do_rescale" in options else level
    seen, differ, all_pixels = set(), 0, 0
    for width, height in SIZES[:-2]:
        image = open_image(sample_image(width, height))
        try:
            [got] = ours.prepare([image])
        except ImageError:
            assert max(width, height) > 100 * min(width, height)
            continue
        expected = theirs(image, **options)
        np.testing.assert_array_equal(got.arrays["sides"], expected["spatial_shapes"])
        for part, pixels in enumerate(expected["pixel_values"].numpy()):
            own = in_order(got, part)
            assert np.abs(own - pixels).max() <= level
            differ, all_pixels = differ + (np.abs(own - pixels) > 1e-5).sum(), all_pixels + own.size
            filled = (got.arrays["position_ids"][part] >= 0).all(-1).sum()
            assert filled == expected["pixel_attention_mask"][part].sum()
        for named in (True, False):
            [worded] = load_processor(config(options, named=named)).prepare([image])
            assert worded.text == words(expected, options, named=named)
            assert worded.text.count("<image>") == worded.tokens == got.tokens
        assert got.tokens <= max_tokens(config(options))
        assert got.units <= max_parts(config(options))
        seen.add((expected["image_rows"][0], expected["image_cols"][0]))
    assert len(seen) > 2 or case == "not split"
    assert differ < all_pixels / 100


def words(made: Any, options: dict[str, Any], *, named: bool) -> str:
    """What transformers' processor writes for an image."""
    kept = {"use_thumbnail": True, "downsample_factor": 2, "encoder_patch_size": 16, **options}
    own = SimpleNamespace(
        image_token="<image>",
        image_start_token=MARKS[0],
        image_end_token=MARKS[1],
        image_thumbnail_token=MARKS[2],
        image_processor=SimpleNamespace(**kept),
    )
    for name in (
        *("_get_image_num_tokens", "_build_image_tokens"),
        *("_compute_tokens_per_tile", "_compute_tokens_for_image"),
    ):
        setattr(own, name, getattr(Lfm2VlProcessor, name).__get__(own))
    info = {name: made[name] for name in ("image_rows", "image_cols", "image_sizes")}
    found = Lfm2VlProcessor.replace_image_token(own, info, 0, use_image_special_tokens=named)
    return str(found)


def test_what_a_checkpoint_may_say() -> None:
    """What is short, and what transformers writes today, are the same."""
    full = json.loads(json.dumps(CASES["tiles"] | {"do_pad": True, "max_tiles": 10}))
    assert config(SMALL) == config(full)


@pytest.mark.parametrize("tokens", [1, 5, 6, 13, 14, 40, 10_000])
def test_smaller_images_for_a_bound_of_tokens(tokens: int) -> None:
    bounded = with_max_tokens(config(SMALL), tokens)
    assert max_tokens(bounded) <= tokens
    processor = load_processor(bounded)
    shapes = [(1, 1), (64, 64), (63, 64), (97, 96), (400, 300)]
    found = {p.tokens for w, h in shapes for p in processor.prepare([np.zeros((h, w, 3), "u1")])}
    assert max(found) <= tokens
    assert max(found) >= min(tokens, 4)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"tile_size": 40}, "a multiple of 16"),
        ({"min_tiles": 1}, "2 or more"),
        ({"do_pad": False}, "do_pad"),
        ({"max_tiles": 65}, "max_tiles"),
        ({"min_image_tokens": 7}, "min_tokens"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "Lfm2VlImageProcessor"),
    ],
)
def test_what_is_not_supported_is_named(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ParameterError, match=problem):
        config(SMALL | options)


@pytest.mark.parametrize("change", [{"tile": 33}, {"thumbnail": 1}, {"begin": None}, {"more": 1}])
def test_a_changed_bundle_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BundleError):
        load_processor(config(SMALL) | change)
