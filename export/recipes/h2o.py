"""H2O: heavy hitters stay, the entries that all queries so far attended to most (arXiv 2306.14048).

Every entry has the sum of the attention that it got, mean over the heads: the prompt's queries
begin it, each new token adds its own. What has least leaves; the last few entries stay, which had
no time yet. The paper gives these half of the cache, here they are a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lvlm.export.recipes.recipe import Recipe, parameter
from lvlm.runtime.policies.evictions import Interval
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.scores import Accumulated
from lvlm.runtime.policies.selections import Evict
from lvlm.runtime.policies.shares import Uniform


@dataclass(frozen=True)
class H2O(Recipe):
    """Recipe ``h2o``."""

    name: ClassVar[str] = "h2o"
    summary: ClassVar[str] = "cache entries that got most attention stay, sums go on in decode"
    source: ClassVar[str] = "H2O, arXiv 2306.14048, NeurIPS 2023"
    small: ClassVar[tuple[str, ...]] = ("recent=8",)

    kv_keep: float = parameter(0.5, "fraction of the cache entries that stays, in (0, 1]")
    kv_cap: int | None = parameter(None, "max entries a layer keeps")
    kv_sinks: int = parameter(0, "first tokens, which always stay")
    recent: int = parameter(32, "last entries, which stay")
    kv_interval: int = parameter(1, "steps from one eviction to the next; 1: the paper's")

    def cache_policy(self) -> CachePolicy:
        return CachePolicy(
            score=Accumulated(),
            select=Evict(),
            decode=Interval(self.kv_interval),
            budget=Uniform(self.kv_keep, self.kv_cap),
            sinks=self.kv_sinks,
            recent=self.recent,
        )


RECIPE = H2O
