"""Image tokens by chance: the baseline that many methods do not beat (arXiv 2511.02650)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lvlm.export.recipes.parts.at_encoder import AtEncoder
from lvlm.export.recipes.recipe import parameter


@dataclass(frozen=True)
class ByChance(AtEncoder):
    """Recipe ``random``."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "baseline: image tokens by chance, before the model"
    source: ClassVar[str] = "UniPruneBench, arXiv 2511.02650"

    seed: int = parameter(0, "of the draw, which is the same for all images of as many tokens")

    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed}


RECIPE = ByChance
