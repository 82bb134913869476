"""From a recipe's name and settings, as an export takes them, to the twin's rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twin_merging import Pyramid
from twin_released import ReleasedElastic, ReleasedPrefix
from twin_rules import FixedPoint, HeavyHitters, Interval, LastQueries, NoRule, Sliding, rounded

Settings = dict[str, Any]


def arguments(settings: Settings) -> list[str]:
    """name=value strings."""
    return [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in settings.items()]


def rule_of(
    recipe: str, settings: Settings, folder: Path, keep: Any = None, kv_keep: float = 1.0
) -> NoRule:
    """The rule of the bundle in ``folder`` at a call's ratios; of the bundle only its depth and,
    where the settings name no profile, the rows of the one that it measured are read."""
    manifest = json.loads((folder / "lvlm.json").read_text())
    file = settings.get("kv_profile") or settings.get("profile")
    profile = json.loads(Path(file).read_text())["rows"] if file else None
    rows = profile or _rows(manifest)
    layers = int(manifest["text"]["layers"])
    shares = profile_shares(rows, kv_keep) if rows else None
    if recipe != "lightvlm":
        if recipe == "pyramidkv":
            shares = falling(layers, kv_keep, settings.get("beta", 20))
        return _cache(recipe, settings, kv_keep, shares)
    places = [min(max(1, rounded(layers * part)), layers - 1) for part in (1 / 14, 2 / 7, 1 / 2)]
    stages = settings.get("stages") or sorted(set(places))
    fractions = settings.get("schedule") if keep is None else keep
    if isinstance(fractions, float):
        fractions = [fractions ** (i / len(stages)) for i in range(1, len(stages) + 1)]
    assert fractions is not None
    names = ("importance", "merge", "recycle", "absorb")
    own = {name: settings[name] for name in names if name in settings}
    kind = settings.get("kv", "interval")
    given = {"kv_sinks": 4} | settings
    cache = NoRule() if kind == "none" else _cache(kind, given, kv_keep, shares)
    return Pyramid(list(fractions), stages, cache, **own)


def _rows(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cache_policy = manifest["cache_policy"] or {"budget": {}}
    found: list[dict[str, Any]] = cache_policy["budget"].get("rows", [])
    return found


def _cache(kind: str, settings: Settings, keep: float, shares: list[float] | None) -> NoRule:
    common = {
        "sinks": settings.get("kv_sinks", 1),
        "layer0": settings.get("positions") == "layer0",
    }
    if kind == "none":
        return NoRule()
    if kind == "interval":
        names = ("kv_floor", "kv_protect", "kv_interval")
        counts = [settings.get(n, usual) for n, usual in zip(names, (128, 32, 64), strict=True)]
        cap = settings.get("kv_cap")
        return Interval(keep, *counts, cap=cap, shares=shares, **common)
    usual: dict[str, Any] = {"cap": settings.get("kv_cap")}
    merge = {"merge": settings.get("select") == "merge" or kind == "elastic-cache"}
    if kind in ("snapkv", "pyramidkv"):
        names = ("window", "kernel", "pool")
        own = {name: settings[name] for name in names if name in settings}
        own |= merge | {"sinks": settings.get("kv_sinks", 0)}
        return LastQueries(keep, shares=shares, **own, **usual)
    if kind in ("tova", "h2o"):
        usual |= {"sinks": settings.get("kv_sinks", 0), "interval": settings.get("kv_interval", 1)}
        if kind == "h2o":
            return HeavyHitters(keep, settings.get("recent", 32), **usual)
        return Interval(keep, floor=0, protect=1, **usual)
    if kind == "streaming-llm":
        return Sliding(keep, sinks=settings.get("kv_sinks", 4), **merge, **usual)
    common["distance"] = settings.get("distance", 25)
    if settings.get("semantics") == "reference":
        if shares is not None:
            return ReleasedPrefix(shares, **common)
        return ReleasedElastic(keep, **common)
    common["within"] = settings.get("within_modality", False)
    return FixedPoint(keep, shares=shares, cap=settings.get("kv_cap"), **merge, **common)


def profile_shares(profile: list[dict[str, Any]], keep: float) -> list[float]:
    """Of every layer at ``keep``, from the profile's rows, with nothing and everything at its
    ends."""
    rows = {row["keep"]: row["fractions"] for row in profile if row["keep"] < 1}
    layers = len(next(iter(rows.values())))
    rows |= {0.0: [0.0] * layers, 1.0: [1.0] * layers}
    below, above = max(k for k in rows if k <= keep), min(k for k in rows if k >= keep)
    part = 0.0 if above == below else (keep - below) / (above - below)
    pairs = zip(rows[below], rows[above], strict=True)
    return [low + (high - low) * part for low, high in pairs]


def falling(layers: int, keep: float, beta: float) -> list[float]:
    """PyramidKV's: the last layer's is ``keep / beta``, the first one's as far above the mean, and
    no more than everything."""
    last, first = keep / beta, 2 * keep - keep / beta
    if first > 1:
        last, first = last + (first - 1), 1.0
    return [first + (last - first) * layer / max(1, layers - 1) for layer in range(layers)]
