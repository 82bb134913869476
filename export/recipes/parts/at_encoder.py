"""Image tokens dropped at the encoder's output: the language model never sees them.

What goes on is chosen from the image alone (runtime/reductions), so that an image's tokens, and
without a cache policy its entries, serve every question about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lvlm.core.ranges import fraction
from lvlm.export.recipes.parts.composed import Composed
from lvlm.export.recipes.recipe import choice, parameter
from lvlm.runtime.bundle.manifest import EncoderReduction
from lvlm.runtime.reductions import rules

Places = Literal["own", "closed"]


@dataclass(frozen=True)
class AtEncoder(Composed):
    """The base of recipes that keep a part of each image's tokens, by the rule of their name."""

    keep: float = parameter(0.35, "fraction of each image's tokens that goes on, in (0, 1]")
    places: Places = parameter(
        "own", "positions of those: own, or closed up as in the methods' released code"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("keep", self.keep)
        choice("places", self.places, Places)
        reduction = self.encoder_reduction()
        rules()[reduction.rule].check(reduction.settings)

    def settings(self) -> dict[str, Any]:
        """Settings of the rule besides the number of tokens."""
        return {}

    def encoder_reduction(self) -> EncoderReduction:
        return EncoderReduction(self.name, 1.0, None, self.places, self.settings())
