"""FastV: behind the second block the image tokens that get least attention are dropped.

A preset of lightvlm's pyramid (arXiv 2403.06764): one stage, scored by the last token, nothing
merged, the whole cache stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lvlm.export.recipes.lightvlm import LightVLM
from lvlm.export.recipes.parts.pyramid import SCORED_BY, Importance, Merge
from lvlm.export.recipes.recipe import parameter

BLOCK = 2


@dataclass(frozen=True)
class FastV(LightVLM):
    """Recipe ``fastv``."""

    name: ClassVar[str] = "fastv"
    summary: ClassVar[str] = "image tokens dropped behind the second block, by the last token"
    source: ClassVar[str] = "FastV, arXiv 2403.06764, ECCV 2024"
    small: ClassVar[tuple[str, ...]] = ()

    keep: float = parameter(0.5, "fraction of each image's tokens that stays, in (0, 1]")
    stages: tuple[int, ...] | None = parameter(
        None, f"blocks whose input is reduced; default {BLOCK}, after DeepStack"
    )
    importance: Importance = parameter("last", SCORED_BY)
    merge: Merge = parameter(
        "drop", "treatment of discarded tokens: drop, nearest, recycle, illava"
    )
    kv: str = parameter("none", "cache compression: none, interval, or any cache recipe's name")

    def places(self, layers: int) -> list[int]:
        del layers
        return [BLOCK]


RECIPE = FastV
