"""Both at once: the encoder's output is thinned out by its own content, and at half depth the
question decides what goes on from there.

What the field's best at few tokens have in common (VScan, arXiv 2505.22654; ProViP): the encoder
knows what is alike, the middle of the language model what is asked for. Here any rule of
runtime/reductions and one stage of lightvlm's merging.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

from lvlm.core.discovery import nearest
from lvlm.core.errors import ParameterError
from lvlm.core.ranges import fraction, integer
from lvlm.core.rounding import rounded
from lvlm.export.recipes.parts.at_encoder import AtEncoder
from lvlm.export.recipes.parts.pyramid import (
    CENTRES_TEXT,
    MERGED_BY,
    SCORED_BY,
    Importance,
    Merge,
    Pyramid,
)
from lvlm.export.recipes.recipe import choice, parameter
from lvlm.runtime.bundle.manifest import EncoderReduction
from lvlm.runtime.reductions import rules


@dataclass(frozen=True)
class Hybrid(AtEncoder):
    """Recipe ``hybrid``."""

    name: ClassVar[str] = "hybrid"
    summary: ClassVar[str] = "image tokens dropped before the model, and merged at half its depth"
    source: ClassVar[str] = "own composition, after VScan, arXiv 2505.22654"

    encoder: str = parameter(
        "divprune", "what goes on from the encoder: divprune, visionzip, or any other rule's name"
    )
    share: float = parameter(
        0.5, "part of the shortening that the encoder's output takes: keep ** share are left there"
    )
    stage: int | None = parameter(
        None, "block whose input is reduced; default round(L / 2), after DeepStack"
    )
    importance: Importance = parameter("text", SCORED_BY)
    merge: Merge = parameter("recycle", MERGED_BY)
    recycle: float | None = parameter(None, CENTRES_TEXT)
    absorb: int = parameter(5, "tokens a centre absorbs at most (merge=recycle, illava)")

    def __post_init__(self) -> None:
        if self.encoder not in rules():
            raise nearest("value of encoder", str(self.encoder), rules())
        super().__post_init__()
        choice("importance", self.importance, Importance)
        choice("merge", self.merge, Merge)
        fraction("share", self.share)
        if self.recycle is not None:
            fraction("recycle", self.recycle)
        integer("absorb", self.absorb, 1)
        if self.stage is not None:
            integer("stage", self.stage, 1)

    def for_layers(self, layers: int, deepstack_layers: int = 0) -> Self:
        stage = self.stage
        if stage is None:
            stage = min(max(1, deepstack_layers, rounded(layers / 2)), layers - 1)
        if not 0 < stage < layers:
            raise ParameterError(
                f"stage {stage}: this model has blocks 1 to {layers - 1} to choose from"
                if layers > 1
                else "recipe 'hybrid' needs at least 2 layers, this model has 1; use divprune"
            )
        return dataclasses.replace(super().for_layers(layers, deepstack_layers), stage=stage)

    def encoder_reduction(self) -> EncoderReduction:
        return EncoderReduction(self.encoder, self.share, None, self.places)

    def token_reduction(self) -> Pyramid:
        if self.stage is None:
            raise ParameterError("call for_layers() first: the stage depends on the depth")
        return Pyramid((self.stage,), None, self.importance, self.merge, self.recycle, self.absorb)


RECIPE = Hybrid
