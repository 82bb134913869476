"""PyramidDrop: half of the image tokens go at each quarter of the depth.

A preset of lightvlm's pyramid (arXiv 2410.17247): scored by the last token, nothing merged, the
whole cache stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lvlm.export.recipes.lightvlm import LightVLM
from lvlm.export.recipes.parts.pyramid import SCORED_BY, Importance, Merge
from lvlm.export.recipes.recipe import parameter


@dataclass(frozen=True)
class PyramidDrop(LightVLM):
    """Recipe ``pyramiddrop``."""

    name: ClassVar[str] = "pyramiddrop"
    summary: ClassVar[str] = "image tokens dropped at three depths, each time half of them"
    source: ClassVar[str] = "PyramidDrop, arXiv 2410.17247, CVPR 2025"
    small: ClassVar[tuple[str, ...]] = ()
    depths: ClassVar[tuple[float, ...]] = (1 / 4, 1 / 2, 3 / 4)

    keep: float = parameter(0.125, "final fraction of each image's tokens, in (0, 1]")
    stages: tuple[int, ...] | None = parameter(
        None, "blocks whose input is reduced; default round(L * 1/4, 1/2, 3/4), after DeepStack"
    )
    importance: Importance = parameter("last", SCORED_BY)
    merge: Merge = parameter(
        "drop", "treatment of discarded tokens: drop, nearest, recycle, illava"
    )
    kv: str = parameter("none", "cache compression: none, interval, or any cache recipe's name")


RECIPE = PyramidDrop
