"""LightVLM's cache: its own compaction at intervals, or the rule of any other cache recipe.

Its own is this project's definition (docs/recipes.md): after prefill and then every ``kv_interval``
steps each layer drops the entries that its last ``kv_protect`` queries attend to least. Merging
composes with every recipe that has a cache rule, found by its name.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lvlm.core.discovery import discover, nearest
from lvlm.core.errors import ParameterError
from lvlm.export.recipes._base import (
    Calibration,
    Recipe,
    choice,
    fraction,
    no_profile_and_keep,
    settable,
    whole,
)
from lvlm.export.recipes._cache import CacheRule, Positions, cap_above
from lvlm.export.recipes._fixed_point import KEEP
from lvlm.runtime.bundle.manifest import Compression

if TYPE_CHECKING:
    from lvlm.export.recipes.lightvlm import LightVLM

INTERVAL = {"kv_floor": 128, "kv_protect": 32, "kv_interval": 64}


def check(recipe: LightVLM) -> None:
    """ParameterError where the cache's parameters are wrong or do not go together."""
    if not recipe.rows:
        no_profile_and_keep("kv_profile", recipe.kv_profile, recipe.kv_keep)
    whole("kv_sinks", recipe.kv_sinks, 0)
    choice("positions", recipe.positions, Positions)
    for name, least in (("kv_floor", 0), ("kv_protect", 1), ("kv_interval", 1)):
        value = getattr(recipe, name)
        if value is None:
            continue
        whole(name, value, least)
        if recipe.kv != "interval":
            raise ParameterError(f"{name} belongs to kv=interval, not to kv={recipe.kv}")
    if recipe.kv == "interval":
        if recipe.kv_keep is not None:
            fraction("kv_keep", recipe.kv_keep)
        cap_above(recipe.kv_cap, recipe.kv_sinks + _interval(recipe, "kv_protect"))
    elif recipe.kv == "none":
        if recipe.kv_keep not in (None, 1.0) or recipe.kv_profile or recipe.kv_cap:
            raise ParameterError("kv=none keeps the whole cache; leave kv_keep and the like out")
    else:
        _other(recipe)


def defaults(recipe: LightVLM) -> dict[str, Any]:
    """Values for the parameters that were left to their defaults, so that manifests show them."""
    values: dict[str, Any] = {}
    if recipe.kv == "interval":
        values |= {name: _interval(recipe, name) for name in INTERVAL}
        if recipe.kv_profile is None and recipe.kv_keep is None:
            values["kv_keep"] = KEEP
    return values


def rule(recipe: LightVLM) -> CacheRule | None:
    if recipe.kv == "none":
        return None
    if recipe.kv != "interval":
        return _other(recipe).cache_rule()
    protect = _interval(recipe, "kv_protect")
    return CacheRule(
        Compression(
            keep=recipe.kv_keep or KEEP,
            profile=recipe.rows,
            cap=recipe.kv_cap,
            floor=_interval(recipe, "kv_floor"),
            sinks=recipe.kv_sinks,
            recent=protect,
            distance=None,
            interval=_interval(recipe, "kv_interval"),
            queries=protect,
            positions=recipe.positions,
            semantics="paper",
        )
    )


def calibration(recipe: LightVLM) -> Calibration | None:
    if recipe.rows or recipe.kv == "none":
        return None
    if recipe.kv == "interval":
        return Calibration(KEEP, recipe.kv_profile) if recipe.kv_profile is not None else None
    return _other(recipe).calibration()


def _interval(recipe: LightVLM, name: str) -> int:
    value = getattr(recipe, name)
    return int(INTERVAL[name] if value is None else value)


def _other(recipe: LightVLM) -> Recipe:
    """The cache recipe that ``kv`` names, with the parameters it shares with this one."""
    known: dict[str, type[Recipe]] = {
        name: kind
        for name, kind in discover("lvlm.export.recipes", "RECIPE").items()
        if kind is not type(recipe) and "kv_keep" in {f.name for f in settable(kind)}
    }
    if recipe.kv not in known:
        raise nearest("value of kv", str(recipe.kv), ["interval", "none", *known])
    kind = known[recipe.kv]
    fields = {f.name for f in dataclasses.fields(kind)}
    given: dict[str, Any] = {
        "kv_keep": recipe.kv_keep,
        "profile": recipe.kv_profile,
        "kv_cap": recipe.kv_cap,
        "rows": recipe.rows or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    for name in set(given) - fields:
        raise ParameterError(f"kv={recipe.kv} takes no {name}; leave kv_{name} out")
    return kind(**given, kv_sinks=recipe.kv_sinks, positions=recipe.positions)  # type: ignore[call-arg]
