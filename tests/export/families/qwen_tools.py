"""Qwen-VL in tests: its models, images, and the positions that transformers gives a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from bundles import TINY, transformers_inputs, tried
from parity_tools import load_torch

from lvlm.export.export_options import ExportOptions as ExportOptions
from lvlm.runtime.prompt.prompts import Prompt

MODELS = [name for name, (family, _) in TINY.items() if "qwen" in family.name and tried(name)]
LIGHT = [name for name in MODELS if name.endswith(":gqa")]


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def recorded(rotary: torch.nn.Module, seen: list[np.ndarray]) -> Any:
    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        positions = kwargs.get("position_ids", args[-1])
        seen.append(positions.expand(3, *positions.shape[-2:])[:, 0].numpy().copy())

    return rotary.register_forward_hook(hook, with_kwargs=True)


def uncompressed(folder: Path, prompt: Prompt, count: int) -> list[np.ndarray]:
    """Positions [3,N] of the prompt and [3,1] of each new token in transformers' generate."""
    theirs, seen = load_torch(folder), []
    ids = torch.tensor([list(prompt.ids)])
    with recorded(theirs.model.language_model.rotary_emb, seen):
        theirs.generate(
            input_ids=ids,
            **transformers_inputs(folder, prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
    return seen
