"""SmolVLM's tiles and the words between them equal transformers'."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from processor_tools import SIZES, sample_image
from transformers.models.smolvlm.image_processing_pil_smolvlm import (
    SmolVLMImageProcessorPil,
    get_resize_output_image_size,
)
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from lvlm.core.errors import BundleError, ParameterError
from lvlm.runtime.media.images import open_image
from lvlm.runtime.processors import load_processor
from lvlm.runtime.processors.smolvlm import max_tokens, normalise_config, with_max_tokens

SMALL: dict[str, Any] = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
CASES: dict[str, dict[str, Any]] = {
    "three by three": SMALL,
    "odd, and no whole tiles": {
        "size": {"longest_edge": 75},
        "max_image_size": {"longest_edge": 15},
    },
    "one tile": SMALL | {"size": {"longest_edge": 32}},
    "scaled up to a tile": SMALL | {"size": {"longest_edge": 21}},
    "not split": SMALL | {"do_image_splitting": False},
    "bicubic, other arithmetic": SMALL
    | {"resample": 3, "rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": [1, 2, 3]},
    "no arithmetic": SMALL | {"do_rescale": False, "do_normalize": False},
    "released": {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
}
NAMED = {"image_processor_type": "SmolVLMImageProcessor"}
AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"


def config(options: dict[str, Any]) -> dict[str, object]:
    return normalise_config({**NAMED, **options}, 4, "<image>", AROUND, WHOLE)


@pytest.mark.parametrize("case", CASES)
def test_tiles_and_words_equal_transformers(case: str) -> None:
    options = CASES[case]
    theirs = SmolVLMImageProcessorPil(**options)
    ours = load_processor(config(options))
    # What is in a checkpoint may be short, or have all of it, as transformers writes it today
    assert config(options) == config(json.loads(json.dumps(theirs.to_dict())))
    seen = set()
    for width, height in [(31, 97), (900, 2)] if case == "released" else SIZES:
        image = sample_image(width, height)
        expected = theirs([image], return_row_col_info=True, return_tensors="np")
        [got] = ours.prepare([open_image(image)])
        pixels = got.arrays["pixel_values"]
        assert pixels.dtype == np.float32
        np.testing.assert_array_equal(pixels, expected["pixel_values"][0].astype(np.float32))
        assert expected["pixel_attention_mask"].all()  # which the vision graph does without
        rows, columns = expected["rows"][0][0], expected["cols"][0][0]
        assert got.text == get_image_prompt_string(rows, columns, 4, AROUND, "<image>", WHOLE)
        assert got.tokens == got.rows == got.text.count("<image>") == 4 * len(pixels)
        assert got.tokens <= max_tokens(config(options))
        seen.add((rows, columns))
    assert len(seen) > 1 or case in ("one tile", "scaled up to a tile", "not split")


@settings(max_examples=examples(200))
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 8_000), st.integers(500, 700))
def test_sizes_equal_transformers(height: int, width: int, longest: int, side: int) -> None:
    """Of every image, and with edges beyond transformers' limit of 4096, without its pixels."""
    options = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": side}}
    ours = load_processor(config(options))
    shape = np.broadcast_to(np.uint8(0), (3, height, width))
    first = get_resize_output_image_size(shape, longest)
    assert ours.first_size(height, width) == first
    with pytest.MonkeyPatch.context() as patch:
        asked: list[Any] = []
        patch.setattr(SmolVLMImageProcessorPil, "resize", lambda *_, size, **__: asked.append(size))
        theirs = SmolVLMImageProcessorPil(**options)
        theirs.resize_for_vision_encoder(np.broadcast_to(np.uint8(0), (3, *first)), side)
    full = asked[0].height, asked[0].width
    assert ours.full_tiles(*first) == full
    tiles = (full[0] // side) * (full[1] // side)
    assert 4 * (tiles + (tiles > 1)) <= max_tokens(config(options))


def test_several_images_are_each_on_their_own() -> None:
    processor = load_processor(config(SMALL))
    images = [open_image(sample_image(width, height)) for width, height in SIZES[4:14]]
    for one, image in zip(processor.prepare(images), images, strict=True):
        [alone] = processor.prepare([image])
        assert one.digest() == alone.digest()
        assert one.text == alone.text


@pytest.mark.parametrize(
    ("tokens", "along"), [(4, 1), (19, 1), (20, 2), (39, 2), (40, 3), (10_000, 16)]
)
def test_smaller_images_for_a_bound_of_tokens(tokens: int, along: int) -> None:
    bounded = with_max_tokens(config(SMALL), tokens)
    assert bounded is not None
    assert bounded["longest_edge"] == 32 * along
    assert max_tokens(bounded) <= tokens
    processor = load_processor(bounded)
    shapes = [(1, 1), (64, 64), (63, 64), (700, 4), (97, 96)]
    found = {p.tokens for w, h in shapes for p in processor.prepare([np.zeros((h, w, 3), "u1")])}
    assert max(found) == max_tokens(bounded)


def test_a_bound_below_one_tile() -> None:
    assert with_max_tokens(config(SMALL), 3) is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "supported are SmolVLMImageProcessor"),
        ({"do_resize": False}, "do_resize"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"size": {"height": 96, "width": 96}}, "size = .*give a longest_edge"),
        ({"max_image_size": 32}, "max_image_size = 32"),
        ({"size": {"longest_edge": 0}}, "longest_edge = 0"),
        ({"size": {"longest_edge": 8_000}}, "side = 364"),
        ({"do_image_splitting": "yes"}, "split = 'yes'"),
        ({"image_std": 0}, "std = "),
    ],
)
def test_what_is_not_supported_is_named(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ParameterError, match=problem):
        config(options)


@pytest.mark.parametrize(
    ("key", "value"),
    [("longest_edge", 9_000), ("side", 1), ("split", 1), ("whole", None), ("tile_tokens", 0)],
)
def test_a_bundles_config_is_not_trusted(key: str, value: object) -> None:
    good = config({})
    with pytest.raises(BundleError, match=key):
        load_processor({**good, key: value})
    with pytest.raises(BundleError, match="unknown key, 'more'"):
        load_processor({**good, "more": 1})
    with pytest.raises(BundleError, match=f"lacks '{key}'"):
        load_processor({k: v for k, v in good.items() if k != key})
