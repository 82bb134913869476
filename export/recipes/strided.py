"""Every so-manieth image token: a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lvlm.export.recipes.parts.at_encoder import AtEncoder


@dataclass(frozen=True)
class StridedRecipe(AtEncoder):
    """Recipe ``strided``."""

    name: ClassVar[str] = "strided"
    summary: ClassVar[str] = "baseline: image tokens at equal steps, before the model"
    source: ClassVar[str] = "-"


RECIPE = StridedRecipe
