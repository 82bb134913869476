"""EVS-like: of a video the tokens that changed since the frame before (after arXiv 2510.14624).

The first frame goes on whole. Written from the description; how a video's tokens are shared out
among its frames is our own (runtime/reductions/evs.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lvlm.export.recipes.parts.at_encoder import AtEncoder
from lvlm.export.recipes.recipe import parameter


@dataclass(frozen=True)
class EvsLike(AtEncoder):
    """Recipe ``evs``."""

    name: ClassVar[str] = "evs"
    summary: ClassVar[str] = "of a video what changed since the frame before; stills stay whole"
    source: ClassVar[str] = "after EVS, arXiv 2510.14624"

    keep: float = parameter(0.35, "fraction of a video's tokens that goes on, in (0, 1]")


RECIPE = EvsLike
