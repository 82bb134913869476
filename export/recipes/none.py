"""No compression: the full cache, the reference every other recipe is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lvlm.export.recipes.recipe import Recipe


@dataclass(frozen=True)
class NoCompression(Recipe):
    """Recipe ``none``: equals transformers' greedy ``generate`` token for token."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "full cache, every token"
    source: ClassVar[str] = "-"


RECIPE = NoCompression
