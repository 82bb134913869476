"""Predictions of what a candidate takes, from the full model's manifest alone: memory and work.

Nothing of the candidate has to be exported for it. Work is counted in multiplications of the
language model: linear layers by the tokens that enter them, attention by pairs of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lvlm.export.recipes.recipe import Recipe
from lvlm.runtime.bundle.manifest import Capacity, Manifest
from lvlm.runtime.engine.memory_plan import plan_memory, slot_capacity
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.image_tokens import keep_ratios, tokens_per_layer


@dataclass(frozen=True)
class Load:
    """The requests that a choice is for: their shape, and how many are answered at a time."""

    text_tokens: int
    images: int
    new_tokens: int
    concurrency: int


@dataclass(frozen=True)
class Prediction:
    """``memory`` in bytes, of all requests at a time; ``prefill`` and ``decode``: multiplications
    of one prompt and of one of its decode steps, as parts of the full model's."""

    memory: int
    prefill: float
    decode: float


NOTHING_KNOWN = Prediction(0, 1.0, 1.0)  # of what cannot be for a model


def imagined(full: Manifest, recipe: Recipe, load: Load) -> Manifest:
    """The manifest of a bundle with ``recipe``, of the model of ``full``, a bundle of none, and as
    large as ``load`` needs.

    Raises ParameterError where the recipe cannot be for it.
    """
    layers = full.text.layers
    own = recipe.for_layers(layers, full.images.deepstack_layers)
    text, images = load.text_tokens + load.new_tokens, max(1, load.images)
    everything = text + images * full.images.tokens
    # Others have that graph for conversations only (lvlm-export --sessions)
    graphs = {
        name: graph for name, graph in full.graphs.items() if own.in_place or name != "extend"
    }
    return replace(
        full,
        graphs=graphs,
        keep=float(own.parameters().get("keep") or 1.0),
        encoder=own.encoder_reduction(),
        reductions=own.reductions(),
        cache_policy=own.cache_policy(),
        capacity=Capacity(text, images, (everything,) * layers),
    )


def predict(
    full: Manifest,
    own: Manifest,
    load: Load,
    image_cache: str,
    keep: float | None = None,
    kv_keep: float | None = None,
) -> Prediction:
    """Memory and time of the bundle ``own`` with these options, beside ``full``, the bundle of
    none.

    Raises ParameterError where ``load`` is more than it has room for.
    """
    text, images = load.text_tokens + load.new_tokens, max(1, load.images)
    slots = slot_capacity(own, text, images, keep, kv_keep)
    memory = plan_memory(own, slots, load.concurrency, None, image_cache)
    before, after = _work(full, load, None, None), _work(own, load, keep, kv_keep)
    return Prediction(memory.total, after[0] / before[0], after[1] / before[1])


def _work(
    manifest: Manifest, load: Load, keep: float | None, kv_keep: float | None
) -> tuple[float, float]:
    """Multiplications of a prompt, and of a decode step in the middle of its answer."""
    text = manifest.text
    ratios = keep_ratios(manifest.shortenings, manifest.keep, keep)
    entering = tokens_per_layer(manifest.shortenings, ratios, manifest.images.tokens, text.layers)
    prompt = np.array([load.text_tokens + load.images * n for n in entering], np.int64)
    budgets = Budgets.of(manifest.cache_policy, text.layers, kv_keep)
    kept = budgets.prompt(prompt[:, None])[:, 0]
    weights = [manifest.weights[name] for name in manifest.graphs["decode"].weights]
    linear = sum(_numbers(w.dims) for w in weights if text.vocab not in w.dims) / text.layers
    head = text.hidden * text.vocab
    pair = 2 * text.heads * text.head_dim  # a score, and the value that it weighs
    prefill = float((prompt * linear + pair * prompt * (prompt + 1) / 2).sum()) + head
    seen = kept + load.new_tokens / 2
    decode = text.layers * linear + pair * float(seen.sum()) + head
    return prefill, decode


def _numbers(dims: tuple[int, ...]) -> int:
    return int(np.prod(dims, dtype=np.int64))
