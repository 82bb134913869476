"""What tests make checkpoints and bundles of: models, and recipes with their settings.

Not in conftest.py: folders have files of that name, too, and ``import conftest`` may find any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from example_counts import whole
from settings import CACHED

from lvlm.core.discovery import discover
from lvlm.export.checkpoint.checkpoint import find_family
from lvlm.export.families.family import Family
from lvlm.export.recipes.recipe import cache_recipes
from lvlm.runtime.prompt.prompts import Prompt

FAMILIES: dict[str, Family] = discover("lvlm.export.families", "FAMILY")
TINY = {
    f"{family.name}:{name}": (family, config)
    for family in FAMILIES.values()
    for name, config in family.tiny_configs()
}
# The configurations of a normal run: all of LLaVA's, which differ in text model and tower, and one
# of every other family.
USUAL = [
    name
    for name, (family, config) in TINY.items()
    if family.name == "llava" or config is next(c for f, c in TINY.values() if f is family)
]
# In a normal run the second configurations are read, but not exported.
EXPORTED = list(TINY) if whole() else USUAL


def covered(family: Family) -> bool:
    """Whether all its leaf modules are some of another's: what is traced there is traced here."""
    return any(set(family.leaves) < set(other.leaves) for other in FAMILIES.values())


# One of each other family; in a normal run, of those that have the same modules, one.
OTHERS = [
    name
    for name in USUAL
    if not name.startswith("llava:") and (whole() or not covered(TINY[name][0]))
]


def moves(name: str) -> bool:
    """Whether recipes may drop a model's tokens or entries inside the language model: not where
    layers have a window that hides something of a prompt of tests, or keep states."""
    windowed = "sliding_attention" in layer_types(name)
    hides = windowed and TINY[name][1].text_config.sliding_window <= 2_500
    return not hides and not has_states(name)


def has_states(name: str) -> bool:
    """Whether some of a model's layers have a state in place of a cache."""
    return bool({"conv", "linear_attention"}.intersection(layer_types(name)))


def tried(name: str) -> bool:
    """Whether a model's images and videos are tried: in a normal run not those of a second
    configuration with states, whose tower is another family's."""
    return name in EXPORTED or not has_states(name)


def layer_types(name: str) -> Sequence[str]:
    return getattr(TINY[name][1].text_config, "layer_types", None) or ()


# With lightvlm in a normal run: one of every family, whose text models are all there are.
MERGED = ["digits-llava", "llava:llama-mha-bias-rope3-siglip", *filter(moves, OTHERS)]
# With lightvlm and half of its cache: in a normal run the trained model, and those whose positions
# are more than one count each, which merged tokens keep.
LIGHT = MERGED if whole() else [n for n in MERGED if n.startswith(("digits-llava", "qwen"))]
# In a normal run: every one on the trained model, each of MERGED with one of them (Qwen3-VL with
# compaction at intervals, the one with few heads with what TensorRT-RTX builds for it).
CACHED_USUAL = [
    *(("digits-llava", cached) for cached in CACHED),
    *zip(
        [MERGED[1], *reversed(MERGED[2:])],
        cycle(cached for cached in CACHED if "(cached)" in cached),
        strict=False,
    ),
]
# Where layers have states: those that leave tokens as they are; in a normal run the one whose
# scores go on, at intervals, on one model
BESIDE_STATES = [
    (name, f"{cached} (cached)")
    for name in [x for x in EXPORTED if has_states(x)][: None if whole() else 1]
    for cached in (cache_recipes() if whole() else ["h2o"])
]


def transformers_inputs(checkpoint: Path, prompt: Prompt) -> dict[str, torch.Tensor]:
    """What transformers' own model takes for the images of a prompt."""
    config = json.loads((checkpoint / "config.json").read_text())
    return find_family(config, str(checkpoint)).transformers_inputs(prompt)


def their_answer(
    theirs: Any, ids: Sequence[int], given: Mapping[str, torch.Tensor], **options: int
) -> list[int]:
    """The tokens that transformers' own ``generate`` chooses after a prompt's ``ids``, greedily;
    ``given`` are its inputs besides."""
    prompt = torch.tensor([list(ids)])
    with torch.no_grad():
        out = theirs.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            **given,
            do_sample=False,
            **options,
        )
    found: list[int] = out[0, prompt.shape[1] :].tolist()
    return found
