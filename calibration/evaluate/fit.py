"""Fitting a wanted fraction of cache, and an answer, from counts before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lvlm.core.errors import CapacityError
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.kv.answer_limits import new_token_limit
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.image_tokens import keep_ratios, plan_prefill
from lvlm.runtime.options.generation_options import Keep

SMALLEST = 1e-300  # every image is down to one token
HALVINGS = 64  # past the precision of a float


@dataclass(frozen=True)
class SampleShape:
    """A sample in numbers: its text tokens, the tokens of each image, the answer's token ids."""

    text_tokens: int
    image_tokens: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def prompt_tokens(self) -> int:
        return self.text_tokens + sum(self.image_tokens)


@dataclass(frozen=True)
class Reach:
    """``keep`` is None if the fraction is out of reach; ``min_kept`` is the smallest one within."""

    keep: float | None
    min_kept: float


def solve_keep(manifest: Manifest, shape: SampleShape, wanted: float) -> Reach:
    """The ``keep`` whose entries, mean over layers, over the prompt's tokens are nearest to
    ``wanted``.

    Token counts are whole, so that one image's fraction is met up to one token. Text and the
    blocks before the first reduction stay: a fraction more than one token below what they leave is
    out of reach.
    """
    layers = manifest.text.layers
    everything = shape.prompt_tokens * layers

    def total(keep: float) -> int:  # never falls as keep rises
        return int(entries(manifest, shape, keep).sum())

    def around(goal: float) -> tuple[float, float]:
        """The two keeps around ``goal``: the last that does not exceed it, and the next."""
        low, high = SMALLEST, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if total(middle) <= goal else (low, middle)
        return low, high

    goal, minimum = wanted * everything, total(SMALLEST)
    if minimum - goal > layers:
        return Reach(None, minimum / everything)
    best = min((total(keep) for keep in around(goal)), key=lambda count: abs(count - goal))
    # The middle of the keeps that give this count, away from where a count tips over
    return Reach((around(best - 1)[1] + around(best)[0]) / 2, minimum / everything)


def new_tokens(
    manifest: Manifest, shape: SampleShape, keep: Keep | None, kv_keep: float | None, wanted: int
) -> int:
    """Number of new tokens, up to ``wanted``, that the bundle's capacity has room for; 0: none."""
    budgets = Budgets.of(manifest.cache_policy, manifest.text.layers, kv_keep)
    entering, images = entries(manifest, shape, keep), len(shape.image_tokens)
    try:
        return new_token_limit(
            manifest.capacity, budgets, entering, shape.text_tokens, images, wanted
        )
    except CapacityError:
        return 0


def entries(manifest: Manifest, shape: SampleShape, keep: Keep | None) -> np.ndarray:
    """Tokens [L] that enter each block."""
    ratios = keep_ratios(manifest.shortenings, manifest.keep, keep)
    images: Sequence[Sequence[int]] = [shape.image_tokens]
    plan = plan_prefill(
        manifest.shortenings, ratios, manifest.text.layers, [shape.text_tokens], images, [1]
    )
    return plan.entries[:, 0]
