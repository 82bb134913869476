"""VisionZip: what the vision tower itself looks at stays, the rest is merged (arXiv 2412.04467).

The attention of the last tower layer that is used ranks the tokens. Merged are projected features,
where the paper merges before the projector: that is the one place all families have in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lvlm.export.recipes.parts.at_encoder import AtEncoder
from lvlm.export.recipes.recipe import parameter
from lvlm.runtime.reductions.visionzip import MERGED


@dataclass(frozen=True)
class VisionZipRecipe(AtEncoder):
    """Recipe ``visionzip``."""

    name: ClassVar[str] = "visionzip"
    summary: ClassVar[str] = "what the vision tower attends to stays, the rest is merged"
    source: ClassVar[str] = "VisionZip, arXiv 2412.04467, CVPR 2025"

    merged: float = parameter(
        MERGED, "part of the tokens that go on which the others are merged into, from 0 to below 1"
    )

    def settings(self) -> dict[str, Any]:
        return {"merged": self.merged}


RECIPE = VisionZipRecipe
