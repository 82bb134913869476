"""Checks beyond a few steps of one prompt: manifest, choice of tokens, rows of the embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lvlm.export.verify.checks import Check
from lvlm.export.verify.judge import Judge
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.options.generation_config import GenerationConfig

if TYPE_CHECKING:
    from lvlm.export.export_plan import ExportPlan

ROWS = 4096  # of the embedding in memory at a time
ASKED = (
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_new_tokens"),
    *("suppress_tokens", "begin_suppress_tokens", "top_k", "top_p"),
)


def planned(plan: ExportPlan, manifest: Manifest) -> Check:
    """The recipe and the cache's room: what only prompts longer than the one here would show."""
    rule = plan.recipe.cache_rule()
    pairs = {
        "recipe": plan.recipe.name,
        "parameters": plan.recipe.parameters(),
        "keep": float(plan.recipe.parameters().get("keep", 1.0)),
        "reductions": plan.recipe.reductions(),
        "encoder": plan.encoder,
        "cache_policy": rule.cache_policy if rule else None,
        "capacity": plan.cache.capacity,
    }
    wrong = sum(_plain(getattr(manifest, name)) != _plain(value) for name, value in pairs.items())
    return Check("manifest: recipe and room for the cache", wrong, 0, "fields that differ")


def choosing(judge: Judge, manifest: Manifest) -> Check:
    """Checks of generation_config.json's part in choosing tokens, and of the named tokens."""
    ours = GenerationConfig.of(manifest.generation, manifest.text.eos_ids)
    theirs, usual = judge.model.generation_config, GenerationConfig()
    names = [*ASKED, *(["min_length"] if theirs.min_new_tokens is None else [])]
    wrong = 0
    for name in names:
        value = getattr(theirs, name, None)
        value = getattr(usual, name) if value is None else value
        wrong += _plain(getattr(ours, name)) != _plain(value)
    wrong += manifest.special_tokens != judge.special_tokens
    return Check("manifest: generation, special tokens", wrong, 0, "fields that differ")


def embedding(judge: Judge, folder: Path, manifest: Manifest) -> Check | None:
    """Every row of the table of tokens, of which a prompt looks up a few; None where the bundle has
    it in another form."""
    table = judge.model.get_input_embeddings().weight
    name = next(n for n, p in judge.model.named_parameters() if p is table)
    stored = manifest.weights.get(name)
    if stored is None or stored.dims != tuple(table.shape):
        return None
    dtype = getattr(torch, stored.dtype)
    data = np.memmap(folder / stored.file, np.uint8, "r", stored.offset, (stored.bytes,))
    width, wrong = stored.bytes // len(table), 0
    for first in range(0, len(table), ROWS):
        theirs = table[first : first + ROWS].to(dtype)
        part = np.array(data[first * width : first * width + theirs.numel() * dtype.itemsize])
        ours = torch.from_numpy(part).view(dtype).view(theirs.shape)
        wrong += int((ours != theirs).any(dim=1).sum())
    return Check(f"rows of the embedding, of {len(table)}", wrong, 0, "rows that differ")


def _plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value, default=vars))
