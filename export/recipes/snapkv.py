"""SnapKV: what the end of the prompt attends to stays, each head its own (arXiv 2404.14469).

After prefill the attention of the prompt's last ``window`` queries ranks the entries before them;
the scores are pooled over neighbouring positions, so that what surrounds an important entry stays,
too. Each key head keeps its own entries, by the mean over its query heads. Decode only appends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lvlm.export.recipes.parts.selection import SELECT, Selection, selection
from lvlm.export.recipes.recipe import Recipe, choice, parameter
from lvlm.runtime.policies.evictions import Append
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.scores import Window
from lvlm.runtime.policies.shares import Uniform

Pool = Literal["mean", "max"]


@dataclass(frozen=True)
class SnapKV(Recipe):
    """Recipe ``snapkv``."""

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = "of the prompt stays what its last tokens attend to, per head"
    source: ClassVar[str] = "SnapKV, arXiv 2404.14469, NeurIPS 2024"
    small: ClassVar[tuple[str, ...]] = ("window=8",)

    kv_keep: float = parameter(0.5, "fraction of the prompt's entries that stays, in (0, 1]")
    kv_cap: int | None = parameter(None, "max entries of a prompt that a layer keeps")
    kv_sinks: int = parameter(0, "first tokens, which always stay")
    window: int = parameter(64, "last prompt tokens, which stay and whose queries rank the others")
    kernel: int = parameter(5, "neighbouring positions that scores are pooled over; 1: none")
    pool: Pool = parameter("mean", "mean or max of these")
    select: Selection = parameter("evict", SELECT)

    def __post_init__(self) -> None:
        choice("pool", self.pool, Pool)

    def cache_policy(self) -> CachePolicy:
        return CachePolicy(
            score=Window(self.window, self.kernel, self.pool, per_head=True),
            select=selection(self.select),
            decode=Append(),
            budget=Uniform(self.kv_keep, self.kv_cap),
            sinks=self.kv_sinks,
            recent=self.window,
        )


RECIPE = SnapKV
