"""Copies of a checkpoint, changed in one way each, and what an export plans with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.recipes.none import NoCompression
from lvlm.export.recipes.recipe import Recipe

NAME = "llava:qwen2-tied-siglip"


def plan(folder: Path, recipe: Recipe | None = None, **options: Any) -> Any:
    output = folder.parent / "out"
    return make_plan(ExportOptions(str(folder), recipe or NoCompression(), output, **options))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def change_config(folder: Path, name: str = "config.json", /, **values: Any) -> None:
    file = folder / name
    config = json.loads(file.read_text())
    for path, value in values.items():
        where = config
        *parents, last = path.split("__")
        for parent in parents:
            where = where[parent]
        where[last] = value
    file.write_text(json.dumps(config))
