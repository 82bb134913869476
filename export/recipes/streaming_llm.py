"""StreamingLLM: the first tokens and the last ones stay, whatever they say (arXiv 2309.17453).

Attention is not read. After prefill the oldest entries beyond the sinks are gone, and in decode the
oldest one leaves whenever the cache exceeds its share: a window that slides. With ``kv_cap`` it
never grows beyond that. Unlike the paper's, positions are the true ones, as in every recipe here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lvlm.export.recipes.parts.selection import SELECT, Selection, selection
from lvlm.export.recipes.recipe import Recipe, parameter
from lvlm.runtime.policies.evictions import Oldest
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.scores import Recency
from lvlm.runtime.policies.shares import Uniform


@dataclass(frozen=True)
class StreamingLLM(Recipe):
    """Recipe ``streaming-llm``."""

    name: ClassVar[str] = "streaming-llm"
    summary: ClassVar[str] = "the first few and the last cache entries stay, a window that slides"
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453, ICLR 2024"

    kv_keep: float = parameter(0.5, "fraction of the cache entries that stays, in (0, 1]")
    kv_cap: int | None = parameter(None, "max entries a layer keeps, sinks and window together")
    kv_sinks: int = parameter(4, "first tokens, which always stay")
    select: Selection = parameter("evict", f"of the prompt: {SELECT}")

    def cache_policy(self) -> CachePolicy:
        return CachePolicy(
            score=Recency(),
            select=selection(self.select),
            decode=Oldest(),
            budget=Uniform(self.kv_keep, self.kv_cap),
            sinks=self.kv_sinks,
        )


RECIPE = StreamingLLM
