"""TOVA: the entry that the newest token attends to least leaves, step by step (arXiv 2401.06104).

The cache as a multi-state RNN's state: after prefill the last prompt token ranks the entries, in
decode each new token does, and what gets least attention, mean over the heads of a layer, is gone.
Unlike the paper's, a token's own entry stays for its own step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lvlm.export.recipes.recipe import Recipe, parameter
from lvlm.runtime.policies.evictions import Interval
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.scores import Latest
from lvlm.runtime.policies.selections import Evict
from lvlm.runtime.policies.shares import Uniform


@dataclass(frozen=True)
class Tova(Recipe):
    """Recipe ``tova``."""

    name: ClassVar[str] = "tova"
    summary: ClassVar[str] = "the cache entry that the newest token attends to least leaves"
    source: ClassVar[str] = "TOVA, arXiv 2401.06104, EMNLP 2024"

    kv_keep: float = parameter(0.5, "fraction of the cache entries that stays, in (0, 1]")
    kv_cap: int | None = parameter(None, "max entries a layer keeps")
    kv_sinks: int = parameter(0, "first tokens, which always stay")
    kv_interval: int = parameter(1, "steps from one eviction to the next; 1: the paper's")

    def cache_policy(self) -> CachePolicy:
        return CachePolicy(
            score=Latest(),
            select=Evict(),
            decode=Interval(self.kv_interval),
            budget=Uniform(self.kv_keep, self.kv_cap),
            sinks=self.kv_sinks,
            recent=1,
        )


RECIPE = Tova
