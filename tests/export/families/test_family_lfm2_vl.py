"""LFM2-VL: what is refused by name, and what an export plans of states."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import TINY
from torch.nn import functional

from lvlm.core.errors import CheckpointError, ParameterError
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import ExportPlan, make_plan
from lvlm.export.families.lfm2_vl import FAMILY
from lvlm.export.families.parts.lfm2_vision import Lfm2Vision
from lvlm.export.recipes.recipe import known_recipe

FIRST = "lfm2-vl:gqa-conv-first"


def plan(folder: Path, recipe: str = "none", **options: Any) -> ExportPlan:
    return make_plan(
        ExportOptions(model=str(folder), recipe=known_recipe(recipe)(), output=folder, **options)
    )


@pytest.mark.parametrize(
    ("part", "change", "problem"),
    [
        ("text_config", {"layer_types": ["conv"] * 5}, "no layer that attends"),
        (
            "text_config",
            {"layer_types": ["full_attention"] * 4 + ["sliding_attention"]},
            "layer type",
        ),
        ("text_config", {"conv_L_cache": 1}, "conv_L_cache 1"),
        ("text_config", {"model_type": "lfm2_moe"}, "text backbone 'lfm2_moe'"),
        ("vision_config", {"num_patches": 20}, "20 learned positions"),
        ("vision_config", {"num_channels": 4}, "num_channels"),
        ("vision_config", {"model_type": "siglip_vision_model"}, "vision tower"),
    ],
)
def test_what_is_not_supported_is_named(part: str, change: dict[str, Any], problem: str) -> None:
    raw = json.loads(TINY[FIRST][1].to_json_string(use_diff=False))
    FAMILY.read_config(raw)
    raw[part] |= change
    with pytest.raises(CheckpointError, match=problem):
        FAMILY.read_config(raw)


def test_files_of_two_models(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint(FIRST), tmp_path / "checkpoint"))
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"encoder_patch_size": 4}))
    with pytest.raises(CheckpointError, match="files of two models"):
        plan(folder)


def test_states_are_planned(checkpoint: Callable[[str], Path]) -> None:
    """Bytes of one sequence: entries of two layers, two inputs of three."""
    found = plan(checkpoint(FIRST), max_text_len=64, max_images=1)
    assert found.skeleton.language.state_sizes == ((3, 2, 64),)
    assert len(found.cache.capacity.per_layer) == 2
    entries = 2 * 2 * 16 * sum(found.cache.capacity.per_layer)
    assert found.cache.bytes == 4 * (entries + 3 * 2 * 64)


def test_nothing_is_merged_beside_states(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ParameterError, match="3 of its 5 layers take all tokens side by side"):
        plan(checkpoint(FIRST), "lightvlm")


@pytest.mark.parametrize(("tokens", "most"), [(100, 48), (47, 39), (29, 12), (5, 5)])
def test_fewer_tokens_an_image(tokens: int, most: int, checkpoint: Callable[[str], Path]) -> None:
    """Fewer tiles, or none and a smaller image."""
    assert plan(checkpoint(FIRST), max_image_tokens=tokens).images.tokens == most


@pytest.mark.parametrize("shape", [(2, 3), (4, 4), (9, 5), (13, 31)])
def test_learned_positions_are_stretched_as_torch_does(shape: tuple[int, int]) -> None:
    """Shrunk with antialiasing, too: what transformers resizes them by."""
    family, config = TINY[FIRST]
    torch.manual_seed(1)
    model = family.build(config)
    vision = Lfm2Vision(model)
    table = model.model.vision_tower.embeddings.position_embedding.weight.detach()
    square = table.reshape(4, 4, -1).permute(2, 0, 1)[None]
    expected = functional.interpolate(square, shape, mode="bilinear", antialias=True)
    places = torch.from_numpy(np.moveaxis(np.indices(shape), 0, -1).reshape(1, -1, 2))
    with torch.no_grad():
        found = vision._positions(places, torch.tensor([shape]))
    torch.testing.assert_close(found[0], expected[0].flatten(1).T, atol=1e-5, rtol=0)
