"""PrefixKV: every layer its own share of the cache, found by one global threshold (2412.03409).

The shares are a profile: read from a file that lvlm-calibrate wrote, or measured while exporting.
Prompts never decide them: budgets that depend on data would make every shape depend on data.
``semantics=reference`` rounds as the released code does, for parity tests only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

from lvlm.core.errors import ParameterError
from lvlm.core.ranges import fraction
from lvlm.export.recipes.parts.cache_rule import Semantics
from lvlm.export.recipes.parts.fixed_point import KEEP, FixedPointRecipe
from lvlm.export.recipes.parts.selection import SELECT, Selection, selection
from lvlm.export.recipes.recipe import (
    Calibration,
    choice,
    file_name,
    no_profile_and_keep,
    parameter,
)
from lvlm.runtime.policies.policy import Budget, CachePolicy
from lvlm.runtime.policies.shares import (
    Mixed,
    Profile,
    ProfileRow,
    ReleasedProfile,
    ReleasedUniform,
    Uniform,
)


@dataclass(frozen=True)
class PrefixKV(FixedPointRecipe):
    """Recipe ``prefixkv``. ``rows`` are the profile, once it is known."""

    name: ClassVar[str] = "prefixkv"
    summary: ClassVar[str] = "the most attended cache entries stay, each layer with its own budget"
    source: ClassVar[str] = "PrefixKV, arXiv 2412.03409"

    kv_keep: float | None = parameter(
        None, f"fraction of all cache entries that stays; default {KEEP}, or the profile's own"
    )
    profile: str | None = parameter(None, "file that lvlm-calibrate wrote; it sets kv_keep")
    samples: str | None = parameter(
        None, "jsonl of image and prompt to calibrate on; default: a few built-in ones"
    )
    adaptive: float = parameter(
        1.0, "part of the budget that the profile lays out, in (0, 1]; the rest is uniform"
    )
    select: Selection = parameter("evict", SELECT)
    semantics: Semantics = parameter("paper", "paper, or reference: the released code's rounding")
    rows: tuple[ProfileRow, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rows:
            no_profile_and_keep("profile", self.profile, self.kv_keep)
        if self.profile is not None and self.samples is not None:
            raise ParameterError("profile and samples are both given; a profile needs no samples")
        fraction("adaptive", self.adaptive)
        choice("semantics", self.semantics, Semantics)
        if self.semantics == "reference" and self.kv_cap is not None:
            raise ParameterError("semantics=reference has no kv_cap; the released code lacks it")
        if self.semantics == "reference" and self.adaptive != 1:
            raise ParameterError("semantics=reference has no adaptive; the released code lacks it")
        if self.semantics == "reference" and self.select != "evict":
            raise ParameterError("semantics=reference has no select; the released code lacks it")

    def calibration(self) -> Calibration | None:
        if self.rows:
            return None
        return Calibration(self.kv_keep or KEEP, self.profile, self.samples)

    def with_profile(self, keep: float, rows: tuple[ProfileRow, ...]) -> Self:
        return dataclasses.replace(
            self,
            kv_keep=keep,
            rows=rows,
            profile=file_name(self.profile),
            samples=file_name(self.samples),
        )

    def cache_policy(self) -> CachePolicy:
        return self.compacted_once(self._budget(self.kv_keep or KEEP), selection(self.select))

    def _budget(self, keep: float) -> Budget:
        if not self.rows:  # until they are known
            uniform = ReleasedUniform if self.semantics == "reference" else Uniform
            return uniform(keep, self.kv_cap)
        if self.semantics == "reference":
            return ReleasedProfile(keep, rows=self.rows)
        if self.adaptive < 1:
            return Mixed(keep, self.kv_cap, self.rows, self.adaptive)
        return Profile(keep, self.kv_cap, self.rows)


RECIPE = PrefixKV
