"""A token reduction with the cache policy of choice: the parameters and the code of the latter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from lvlm.export.recipes.parts import merged_cache
from lvlm.export.recipes.parts.cache_rule import Positions
from lvlm.export.recipes.parts.fixed_point import KEEP
from lvlm.export.recipes.recipe import Calibration, Recipe, file_name, parameter
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.shares import ProfileRow


@dataclass(frozen=True)
class Composed(Recipe):
    """The base of recipes that shorten images; ``kv`` says what happens to the cache."""

    kv: str = parameter(
        "none", "cache compression: none, interval (lightvlm's own), or any cache recipe's name"
    )
    kv_keep: float | None = parameter(
        None,
        f"fraction of the cache that stays; default {KEEP}, all where kv is left as it is; or the "
        "profile's own",
    )
    kv_profile: str | None = parameter(None, "file that lvlm-calibrate wrote: a share per layer")
    kv_cap: int | None = parameter(None, "max entries a layer keeps, whatever the fraction")
    kv_sinks: int | None = parameter(None, "first tokens, which always stay; default 4")
    kv_floor: int | None = parameter(None, "entries that always stay; default 128 (kv=interval)")
    kv_protect: int | None = parameter(
        None, "last tokens, whose queries score the rest; default 32 (kv=interval)"
    )
    kv_interval: int | None = parameter(
        None, "steps from one compaction to the next; default 64 (kv=interval)"
    )
    kv_set: tuple[str, ...] | None = parameter(
        None, "further settings of the recipe that kv names; as --set: kv.NAME=VALUE"
    )
    positions: Positions = parameter("true", "of new tokens: true, or layer0 (released code)")
    rows: tuple[ProfileRow, ...] = ()

    def __post_init__(self) -> None:
        merged_cache.check(self)

    def for_layers(self, layers: int, deepstack_layers: int = 0) -> Self:
        del layers, deepstack_layers
        return dataclasses.replace(self, **self.cache_defaults())

    @property
    def usual_keep(self) -> float:
        """The fraction that stays by ``kv=interval`` where nothing is said: half, but all where
        nobody asked for compression, ``kv`` being the recipe's own; calls may ask for less."""
        return 1.0 if self.kv == type(self).kv else KEEP

    def cache_defaults(self) -> dict[str, Any]:
        """Values of the cache's parameters that were left to their defaults."""
        return merged_cache.defaults(self)

    def calibration(self) -> Calibration | None:
        return merged_cache.calibration(self)

    def with_profile(self, keep: float, rows: tuple[ProfileRow, ...]) -> Self:
        name = file_name(self.kv_profile)
        return dataclasses.replace(self, kv_keep=keep, rows=rows, kv_profile=name)

    def cache_policy(self) -> CachePolicy | None:
        return merged_cache.policy(self)
