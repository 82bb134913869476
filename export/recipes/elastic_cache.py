"""Elastic Cache: evicted entries are merged into their nearest kept neighbour (arXiv 2407.18121).

Prefill keeps in every layer the positions that all prompt queries attend to most, and each of them
becomes the mean over its bucket of neighbours; decode then drops entries one by one at a fixed
point. ``semantics=reference`` does what the released code does, for parity tests only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lvlm.core.errors import ParameterError
from lvlm.export.recipes._base import choice, parameter
from lvlm.export.recipes._cache import CacheRule, Semantics
from lvlm.export.recipes._fixed_point import FixedPoint


@dataclass(frozen=True)
class ElasticCache(FixedPoint):
    """Recipe ``elastic-cache``."""

    name: ClassVar[str] = "elastic-cache"
    summary: ClassVar[str] = "cache entries merged into their most attended neighbours"
    source: ClassVar[str] = "Elastic Cache, arXiv 2407.18121, ECCV 2024"

    semantics: Semantics = parameter("paper", "paper, or reference: the released code's quirks")

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("semantics", self.semantics, Semantics)
        if self.semantics == "reference" and self.kv_cap is not None:
            raise ParameterError("semantics=reference has no kv_cap; the released code lacks it")

    def cache_rule(self) -> CacheRule:
        if self.semantics == "paper":
            return CacheRule(self.compression(), mode="merge")
        # The released code counts the fixed point from one entry more than it keeps.
        compression = self.compression(semantics="reference", distance=self.distance - 1)
        return CacheRule(compression, mode="merge-reference")


RECIPE = ElasticCache
