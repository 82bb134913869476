"""Kinds of rotary position tables as checkpoints spell them, old and new: transformers' numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.recipes.none import NoCompression

LLAVA = "llava:llama-gqa-clip"
YARN: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OPTIONS = {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.8}
SPELT_OLD = [
    (LLAVA, {"type": "linear", "factor": 2.0}),
    (LLAVA, {"type": "llama3", **LLAMA3, "original_max_position_embeddings": 64}),
    (LLAVA, {"type": "yarn", **YARN}),
    ("qwen2.5-vl:gqa", {"type": "yarn", **YARN}),
    ("qwen3-vl:gqa", {"type": "yarn", **YARN}),
]
SPELT_NEW = [
    (LLAVA, {"rope_type": "yarn", **YARN, **OPTIONS, "truncate": False}),
    (LLAVA, {"rope_type": "yarn", **YARN, "attention_factor": 1.3}),
]


@pytest.mark.parametrize(("name", "rope"), [*SPELT_OLD, *SPELT_NEW])
def test_tables_are_those_of_transformers(
    name: str, rope: dict[str, Any], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint(name), tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    usual = text.pop("rope_parameters")
    sections = {k: v for k, v in usual.items() if k == "mrope_section"}
    if "type" in rope:
        text |= {"rope_theta": usual["rope_theta"], "rope_scaling": rope | sections}
    else:
        text["rope_parameters"] = {"rope_theta": usual["rope_theta"], **rope, **sections}
    text["max_position_embeddings"] = 4096
    (folder / "config.json").write_text(json.dumps(config))
    plan = make_plan(
        ExportOptions(model=str(folder), recipe=NoCompression(), output=tmp_path / "none")
    )
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    positions = torch.tensor([[0, 1, 7, 100, 1000, 3000]])
    if sections:
        positions = positions.expand(3, 1, -1)
    tables = [
        plan.family.language(model, plan.config).rotaries[0](torch.zeros(1, 6, 8), positions)
        for model in (plan.skeleton.model, theirs)
    ]
    for ours, expected in zip(*tables, strict=True):
        torch.testing.assert_close(torch.as_tensor(ours), expected, atol=1e-6, rtol=0)
