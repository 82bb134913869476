"""LightVLM: pyramid merging of image tokens inside the language model (arXiv 2509.00419).

The paper's text beyond its abstract could not be obtained: this is the project's own definition,
consistent with the abstract and with the same authors' earlier method (see docs/recipes.md).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from lvlm.core.errors import ParameterError
from lvlm.core.ranges import fraction, integer
from lvlm.core.rounding import rounded
from lvlm.export.recipes.parts.composed import Composed
from lvlm.export.recipes.parts.pyramid import (
    CENTRES_TEXT,
    MERGED_BY,
    SCORED_BY,
    Importance,
    Merge,
    Pyramid,
)
from lvlm.export.recipes.recipe import choice, parameter


@dataclass(frozen=True)
class LightVLM(Composed):
    """Recipe ``lightvlm``."""

    name: ClassVar[str] = "lightvlm"
    summary: ClassVar[str] = "image tokens merged in a pyramid over the blocks during prefill"
    source: ClassVar[str] = "arXiv 2509.00419 (own definition beyond its abstract)"
    small: ClassVar[tuple[str, ...]] = ("kv_floor=8", "kv_protect=8", "kv_interval=16")
    # Of the stages, in the model's depth: blocks 2, 8 and 14 of 28
    depths: ClassVar[tuple[float, ...]] = (1 / 14, 2 / 7, 1 / 2)

    keep: float = parameter(0.35, "final fraction of each image's tokens, in (0, 1]")
    stages: tuple[int, ...] | None = parameter(
        None,
        "blocks whose input is reduced; default max(1, round(L * 1/14, 2/7, 1/2)), after DeepStack",
    )
    schedule: tuple[float, ...] | None = parameter(
        None, "fraction of the original tokens left after each stage; default keep ** (i / n)"
    )
    importance: Importance = parameter("text", SCORED_BY)
    merge: Merge = parameter("recycle", MERGED_BY)
    recycle: float | None = parameter(None, CENTRES_TEXT)
    absorb: int = parameter(5, "tokens a centre absorbs at most (merge=recycle, illava)")
    kv: str = parameter(
        "interval", "cache compression: interval (own), none, or any cache recipe's name"
    )

    def __post_init__(self) -> None:
        fraction("keep", self.keep)
        if self.recycle is not None:
            fraction("recycle", self.recycle)
        choice("importance", self.importance, Importance)
        choice("merge", self.merge, Merge)
        integer("absorb", self.absorb, 1)
        super().__post_init__()
        if self.stages is not None:
            _stages(self.stages)
        if self.schedule is not None:
            if not isinstance(self.schedule, tuple) or not self.schedule:
                raise ParameterError("schedule is a list of fractions, e.g. [0.7,0.5,0.35]")
            for ratio in self.schedule:
                fraction("schedule", ratio)
            if list(self.schedule) != sorted(self.schedule, reverse=True):
                raise ParameterError(f"schedule {list(self.schedule)} must not rise")

    def for_layers(self, layers: int, deepstack_layers: int = 0) -> Self:
        if layers < 2:
            raise ParameterError(
                f"recipe '{self.name}' needs at least 2 layers, this model has {layers}; "
                "use --recipe none"
            )
        stages = self.stages
        if stages is None:
            places = (max(1, deepstack_layers, place) for place in self.places(layers))
            stages = tuple(dict.fromkeys(min(place, layers - 1) for place in places))
        if max(stages) >= layers:
            raise ParameterError(
                f"stages {list(stages)}: this model has blocks 1 to {layers - 1} to choose from"
            )
        if self.schedule is not None and len(self.schedule) != len(stages):
            raise ParameterError(
                f"schedule has {len(self.schedule)} fractions for {len(stages)} stages "
                f"{list(stages)}; give one for each"
            )
        keep = self.keep if self.schedule is None else self.schedule[-1]
        return dataclasses.replace(self, stages=stages, keep=keep, **self.cache_defaults())

    def places(self, layers: int) -> list[int]:
        """The stages of a model so deep, where it lets them be."""
        return [rounded(layers * depth) for depth in self.depths]

    def token_reduction(self) -> Pyramid:
        if self.stages is None:
            raise ParameterError("call for_layers() first: the stages depend on the depth")
        return Pyramid(
            self.stages, self.schedule, self.importance, self.merge, self.recycle, self.absorb
        )


def _stages(stages: Any) -> None:
    whole = isinstance(stages, tuple) and all(type(s) is int and s >= 1 for s in stages)
    if not whole or not stages or list(stages) != sorted(set(stages)):
        raise ParameterError(
            f"stages is {stages!r}; give rising block numbers from 1 on, e.g. [2,8,14]"
        )


RECIPE = LightVLM
