"""LightVLM's cache: its own compaction at intervals, or the policy of any other cache recipe.

Its own is this project's definition (docs/recipes.md): after prefill and then every ``kv_interval``
steps each layer drops the entries that its last ``kv_protect`` queries attend to least. Merging
composes with every recipe that has a cache policy, found by its name: that recipe is made from the
parameters both have, and from ``kv_set``, and asked for its policy.
"""

from __future__ import annotations

from typing import Any, Protocol

from lvlm.core.discovery import nearest
from lvlm.core.errors import ParameterError
from lvlm.core.ranges import integer
from lvlm.export.recipes.parts.cache_rule import Positions
from lvlm.export.recipes.parts.fixed_point import KEEP
from lvlm.export.recipes.recipe import (
    Calibration,
    Recipe,
    cache_recipes,
    choice,
    no_profile_and_keep,
    read_settings,
    settable,
)
from lvlm.runtime.policies.evictions import Interval
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.scores import Window
from lvlm.runtime.policies.selections import Evict
from lvlm.runtime.policies.shares import Profile, ProfileRow, Uniform

INTERVAL = {"kv_floor": 128, "kv_protect": 32, "kv_interval": 64}
SINKS = 4
# A parameter here: the same of other recipes.
SHARED = {
    "kv_keep": "kv_keep",
    "kv_profile": "profile",
    "kv_cap": "kv_cap",
    "kv_sinks": "kv_sinks",
    "positions": "positions",
}


class Merging(Protocol):
    """A recipe that merges tokens, by the parameters of its cache."""

    @property
    def kv(self) -> str: ...
    @property
    def kv_keep(self) -> float | None: ...
    @property
    def usual_keep(self) -> float: ...
    @property
    def kv_profile(self) -> str | None: ...
    @property
    def kv_cap(self) -> int | None: ...
    @property
    def kv_sinks(self) -> int | None: ...
    @property
    def kv_set(self) -> tuple[str, ...] | None: ...
    @property
    def positions(self) -> Positions: ...
    @property
    def rows(self) -> tuple[ProfileRow, ...]: ...


def check(recipe: Merging) -> None:
    """ParameterError where the cache's parameters are wrong or do not go together."""
    if not recipe.rows:
        no_profile_and_keep("kv_profile", recipe.kv_profile, recipe.kv_keep)
    if recipe.kv_sinks is not None:
        integer("kv_sinks", recipe.kv_sinks, 0)
    choice("positions", recipe.positions, Positions)
    for name, minimum in (("kv_floor", 0), ("kv_protect", 1), ("kv_interval", 1)):
        value = getattr(recipe, name)
        if value is None:
            continue
        integer(name, value, minimum)
        if recipe.kv != "interval":
            raise ParameterError(f"{name} belongs to kv=interval, not to kv={recipe.kv}")
    if recipe.kv_set and recipe.kv in ("interval", "none"):
        raise ParameterError(
            f"kv.{recipe.kv_set[0]} is for a recipe that kv names, not for kv={recipe.kv}"
        )
    if recipe.kv == "none" and (
        recipe.kv_keep not in (None, 1.0) or recipe.kv_profile or recipe.kv_cap
    ):
        raise ParameterError("kv=none keeps the whole cache; leave kv_keep and the like out")
    policy(recipe)


def defaults(recipe: Merging) -> dict[str, Any]:
    """Values for the parameters that were left to their defaults, so that manifests show them."""
    values: dict[str, Any] = {}
    if recipe.kv == "interval":
        values |= {name: _interval(recipe, name) for name in INTERVAL}
        if recipe.kv_profile is None and recipe.kv_keep is None:
            values["kv_keep"] = recipe.usual_keep
    sinks = recipe.kv in ("interval", "none") or "kv_sinks" in _parameters(_kind(recipe))
    if recipe.kv_sinks is None and sinks:
        values["kv_sinks"] = SINKS
    return values


def policy(recipe: Merging) -> CachePolicy | None:
    if recipe.kv == "none":
        return None
    if recipe.kv != "interval":
        return _other(recipe).cache_policy()
    protect, keep = _interval(recipe, "kv_protect"), recipe.kv_keep
    keep = recipe.usual_keep if keep is None else keep
    return CachePolicy(
        score=Window(protect),
        select=Evict(),
        decode=Interval(_interval(recipe, "kv_interval"), _interval(recipe, "kv_floor")),
        budget=(
            Profile(keep, recipe.kv_cap, recipe.rows)
            if recipe.rows
            else Uniform(keep, recipe.kv_cap)
        ),
        sinks=SINKS if recipe.kv_sinks is None else recipe.kv_sinks,
        recent=protect,
        positions=recipe.positions,
    )


def calibration(recipe: Merging) -> Calibration | None:
    if recipe.rows or recipe.kv == "none":
        return None
    if recipe.kv == "interval":
        return Calibration(KEEP, recipe.kv_profile) if recipe.kv_profile is not None else None
    return _other(recipe).calibration()


def _interval(recipe: Merging, name: str) -> int:
    value = getattr(recipe, name)
    return int(INTERVAL[name] if value is None else value)


def _kind(recipe: Merging) -> type[Recipe]:
    """The cache recipe that ``kv`` names."""
    known = cache_recipes()
    if recipe.kv not in known:
        raise nearest("value of kv", str(recipe.kv), ["interval", "none", *known])
    return known[recipe.kv]


def _parameters(kind: type[Recipe]) -> set[str]:
    return {f.name for f in settable(kind)}


def _other(recipe: Merging) -> Recipe:
    """The recipe ``kv``, with the parameters it shares with this one and those of ``kv_set``."""
    kind = _kind(recipe)
    values = read_settings(kind, recipe.kv_set or ())
    for name, theirs in SHARED.items():
        value = getattr(recipe, name)
        if name == "kv_sinks" and value is None and theirs in _parameters(kind):
            values.setdefault(theirs, SINKS)
        left = value is None or (name == "positions" and value == "true")
        if left or (recipe.rows and name in ("kv_profile", "kv_keep")):
            continue
        if theirs not in _parameters(kind):
            raise ParameterError(f"kv={recipe.kv} takes no {theirs}; leave {name} out")
        values[theirs] = value
    made = kind(**values)
    return made.with_profile(recipe.kv_keep or KEEP, recipe.rows) if recipe.rows else made
