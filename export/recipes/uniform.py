"""Uniform eviction: every layer keeps its most attended entries, the same fraction everywhere.

The baseline that Elastic Cache (arXiv 2407.18121) and PrefixKV (arXiv 2412.03409) are measured
against: without the one's merging and the other's budgets per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lvlm.export.recipes.parts.fixed_point import FixedPointRecipe


@dataclass(frozen=True)
class UniformRecipe(FixedPointRecipe):
    """Recipe ``uniform``."""

    name: ClassVar[str] = "uniform"
    summary: ClassVar[str] = "the most attended cache entries stay, as many in every layer"
    source: ClassVar[str] = "baseline of arXiv 2407.18121 and 2412.03409"


RECIPE = UniformRecipe
