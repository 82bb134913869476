"""Qwen-VL: images of many shapes, positions in three rows, and what an export refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import FAMILIES, TINY, transformers_inputs
from parity_tools import ROWS, load_torch, make_reference
from qwen_tools import LIGHT, MODELS, image, recorded, uncompressed

import lvlm
from lvlm.core.errors import CheckpointError, ParameterError
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.recipes.lightvlm import RECIPE as LIGHTVLM
from lvlm.export.recipes.none import RECIPE
from lvlm.export.recipes.recipe import parse_settings
from lvlm.runtime.options.generation_options import GenerationOptions


@pytest.mark.parametrize("name", MODELS)
def test_images_of_every_shape_equal_transformers_generate(
    name: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    """One token, one row, one column, many of both; in one prompt too."""
    shapes = [(1, 1), (20, 900), (700, 30), (300, 290)]
    theirs = load_torch(checkpoint(name))
    with lvlm.load(bundle(name, max_images=2)) as model:
        for images in (*([image(*s)] for s in shapes), [image(9, 80), image(90, 60)]):
            text = "USER: " + "<image>" * len(images) + "Describe it. ASSISTANT:"
            prompt = model.prepare(0, text, images, GenerationOptions(chat_template=False))
            ids = torch.tensor([list(prompt.ids)])
            inputs = transformers_inputs(checkpoint(name), prompt)
            # Without text between two images transformers takes them for one
            if len(images) == 1:
                positions, _ = theirs.model.get_rope_index(ids, **grid(inputs))
                np.testing.assert_array_equal(prompt.positions, positions[:, 0])
                out = theirs.generate(input_ids=ids, **inputs, max_new_tokens=8, do_sample=False)
                answer = model.generate(text, images, max_new_tokens=8, chat_template=False)
                assert answer.token_ids == out[0, ids.shape[1] :].tolist()
            (first, *_) = prompt.images
            found = theirs.model.get_image_features(
                inputs["pixel_values"], inputs["image_grid_thw"]
            )
            own = [found.pooler_output, *getattr(found, "deepstack_features", [])]
            features = model.calls.graphs.encode(prompt.images)
            assert features[0].shape == (first.tokens, model.manifest.feature_width)
            for mine, *parts in zip(features, *own, strict=True):
                their = torch.cat(parts, dim=1).detach().numpy()
                np.testing.assert_allclose(mine, their, atol=2e-4)


def grid(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in inputs.items() if k != "pixel_values"}


@pytest.mark.parametrize("recipe", ["none", "lightvlm", "elastic-cache", "prefixkv"])
@pytest.mark.parametrize("name", LIGHT)
def test_positions_are_those_of_an_uncompressed_run(
    name: str, recipe: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    """Merging keeps three rows with every token that survives; new tokens count on from them."""
    with lvlm.load(bundle(name, max_images=2)) as model:
        text, images = ROWS[1]
        prompt = model.prepare(0, text, images, GenerationOptions(chat_template=False))
    full = uncompressed(checkpoint(name), prompt, 6)
    np.testing.assert_array_equal(full[0], prompt.positions)
    settings = ["kv_keep=0.5"] if recipe != "none" else []
    reference, seen = make_reference(checkpoint(name), recipe, *settings), []
    if recipe == "prefixkv":
        rows = [(0.5, [0.5] * len(reference.language.blocks))]
        reference.recipe = reference.recipe.with_profile(0.5, profile_rows(rows))
    features = reference.encode(prompt.images)
    with recorded(reference.language.rotaries[0], seen):
        answer = reference.generate(prompt, features, max_new_tokens=6)
    # Angles are made once for the prompt, once after each merging, and once a step.
    first, *merged = seen[: 1 + len(answer.maps)]
    assert len(answer.maps) == len(reference.recipe.reductions())
    np.testing.assert_array_equal(first, full[0])
    now = first
    for positions, moved in zip(merged, answer.maps, strict=True):
        kept = [np.flatnonzero(moved.numpy() == new) for new in range(positions.shape[1])]
        for new, sources in enumerate(kept):
            assert (now[:, sources] == positions[:, new, None]).all(0).any()
        now = positions
    if recipe == "lightvlm":
        assert now.shape[1] < full[0].shape[1]
    steps = seen[1 + len(merged) :]
    assert len(steps) == len(full[1:]) == 5
    for mine, theirs in zip(steps, full[1:], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def profile_rows(rows: list[tuple[float, list[float]]]) -> Any:
    from lvlm.runtime.policies.shares import ProfileRow

    return tuple(ProfileRow(keep, tuple(fractions)) for keep, fractions in rows)


def test_fewer_tokens_per_image(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """--max-image-tokens shrinks what is reserved, and the images with it."""
    for name in LIGHT:
        options: dict[str, Any] = {"model": str(checkpoint(name)), "output": tmp_path / "out"}
        options |= {"recipe": parse_settings(RECIPE, []), "dtype": "fp32"}
        full, small = (make_plan(ExportOptions(**options, max_image_tokens=n)) for n in (None, 12))
        assert small.images.tokens == small.images.max_dims["units"] == 12 < full.images.tokens
        assert small.cache.bytes < full.cache.bytes
        assert small.images.processor["max_tokens"] == 12


def test_merging_waits_for_the_last_features(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Blocks that add image features (DeepStack) need all image tokens."""
    name = "qwen3-vl:mha-tied"
    for stages, fits in (("[1,3]", False), ("[2,3]", True)):
        recipe = parse_settings(LIGHTVLM, [f"stages={stages}"])
        options = ExportOptions(str(checkpoint(name)), recipe, tmp_path / "out", dtype="fp32")
        if fits:
            assert make_plan(options).images.deepstack_layers == 2
        else:
            with pytest.raises(ParameterError, match=r"at block 1.* merge from block 2 on"):
                make_plan(options)


def hub_config(family: Any) -> dict[str, Any]:
    """As the first release has it: text options beside the others."""
    name = next(n for n, (f, _) in TINY.items() if f is family)
    raw = TINY[name][1].to_dict()
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat = {k: v for k, v in text.items() if k not in ("model_type", "layer_types")}
    vision = {k: v for k, v in raw["vision_config"].items() if k != "rope_parameters"}
    vision["model_type"] = raw["model_type"]
    return {**flat, **raw, "vision_config": vision, "rope_scaling": scaling, "rope_theta": 1e6}


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl"])
def test_the_hub_s_config_is_read_and_what_is_not_supported_refused(family: str) -> None:
    found = FAMILIES[family]
    raw = hub_config(found)
    config = found.read_config(raw)
    assert config.text_config.rope_parameters["rope_theta"] == 1e6
    assert config.text_config.num_hidden_layers == raw["num_hidden_layers"]
    for change, match in [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}, "mrope_section"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"vision_config": {**raw["vision_config"], "in_channels": 1}}, "in_channels"),
    ]:
        with pytest.raises(CheckpointError, match=match):
            found.read_config({**raw, **change})
