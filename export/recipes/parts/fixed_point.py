"""Parts shared by the recipes that compact the prompt once and then evict one entry at a time.

After prefill an entry leaves whenever the cache exceeds its share: the one at the fixed point,
``distance`` before the end of what was kept of the prompt (arXiv 2407.18121, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

from lvlm.core.ranges import fraction, integer
from lvlm.export.recipes.parts.cache_rule import Positions
from lvlm.export.recipes.recipe import Recipe, choice, parameter
from lvlm.runtime.policies.evictions import FixedPoint, ReleasedFixedPoint
from lvlm.runtime.policies.policy import Budget, CachePolicy
from lvlm.runtime.policies.scores import AllQueries
from lvlm.runtime.policies.selections import Evict, Select
from lvlm.runtime.policies.shares import Uniform

KEEP = 0.5
EVICT = Evict()


@dataclass(frozen=True)
class FixedPointRecipe(Recipe):
    """The parameters of fixed-point elimination."""

    kv_keep: float | None = parameter(KEEP, "fraction of the cache entries that stays, in (0, 1]")
    kv_cap: int | None = parameter(None, "max entries a layer keeps, whatever the fraction")
    kv_sinks: int = parameter(1, "first tokens, which always stay")
    distance: int = parameter(25, "decode evicts this far before the end of the kept prompt")
    positions: Positions = parameter("true", "of new tokens: true, or layer0 (released code)")

    def __post_init__(self) -> None:
        if self.kv_keep is not None:
            fraction("kv_keep", self.kv_keep)
        integer("distance", self.distance, 1)
        choice("positions", self.positions, Positions)

    def cache_policy(self) -> CachePolicy:
        return self.compacted_once(Uniform(self.kv_keep or KEEP, self.kv_cap))

    def compacted_once(self, budget: Budget, select: Select = EVICT) -> CachePolicy:
        """Compaction by the attention of all prompt queries, then elimination at the fixed
        point."""
        eviction = ReleasedFixedPoint if budget.released else FixedPoint
        return CachePolicy(
            score=AllQueries(),
            select=select,
            decode=eviction(self.distance),
            budget=budget,
            sinks=self.kv_sinks,
            positions=self.positions,
        )
