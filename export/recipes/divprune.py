"""DivPrune: of each image the tokens that are most unlike each other (arXiv 2503.02175).

On projected features; any tower will do, also one without a class token. Written from the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lvlm.export.recipes.parts.at_encoder import AtEncoder


@dataclass(frozen=True)
class DivPruneRecipe(AtEncoder):
    """Recipe ``divprune``."""

    name: ClassVar[str] = "divprune"
    summary: ClassVar[str] = "of each image the tokens most unlike each other, before the model"
    source: ClassVar[str] = "DivPrune, arXiv 2503.02175, CVPR 2025"


RECIPE = DivPruneRecipe
