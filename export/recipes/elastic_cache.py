"""Elastic Cache: evicted entries are merged into their nearest kept neighbour (arXiv 2407.18121).

Prefill keeps in every layer the positions that all prompt queries attend to most, and each of them
becomes the mean over its bucket of neighbours; decode then drops entries one by one at a fixed
point. ``semantics=reference`` does what the released code does, for parity tests only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from lvlm.core.errors import ParameterError
from lvlm.export.recipes.parts.cache_rule import Semantics
from lvlm.export.recipes.parts.fixed_point import KEEP, FixedPointRecipe
from lvlm.export.recipes.recipe import choice, parameter
from lvlm.runtime.policies.evictions import ReleasedFixedPoint
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.selections import Merge, ReleasedMerge
from lvlm.runtime.policies.shares import ReleasedUniform, Uniform


@dataclass(frozen=True)
class ElasticCache(FixedPointRecipe):
    """Recipe ``elastic-cache``."""

    name: ClassVar[str] = "elastic-cache"
    summary: ClassVar[str] = "cache entries merged into their most attended neighbours"
    source: ClassVar[str] = "Elastic Cache, arXiv 2407.18121, ECCV 2024"

    semantics: Semantics = parameter("paper", "paper, or reference: the released code's quirks")
    within_modality: bool = parameter(False, "nothing merges across the border of text and image")

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("semantics", self.semantics, Semantics)
        if not isinstance(self.within_modality, bool):
            raise ParameterError(f"within_modality is {self.within_modality!r}; give true or false")
        if self.semantics == "reference" and self.kv_cap is not None:
            raise ParameterError("semantics=reference has no kv_cap; the released code lacks it")
        if self.semantics == "reference" and self.within_modality:
            raise ParameterError(
                "semantics=reference has no within_modality; the released code lacks it"
            )

    def cache_policy(self) -> CachePolicy:
        if self.semantics == "paper":
            budget = Uniform(self.kv_keep or KEEP, self.kv_cap)
            return self.compacted_once(budget, Merge(self.within_modality))
        released = self.compacted_once(ReleasedUniform(self.kv_keep or KEEP), ReleasedMerge())
        # The released code counts the fixed point from one entry more than it keeps.
        return replace(released, decode=ReleasedFixedPoint(self.distance - 1))


RECIPE = ElasticCache
