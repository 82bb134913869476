"""Bundles of checkpoints drawn at random against their twins, every recipe with drawn settings."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from against import ROWS, compare_steps
from drawn import PREFIX
from example_counts import whole
from made_profile import write_profile
from twin_model import Twin
from twin_recipes import Settings, arguments, rule_of

COUNT = 44 if whole() else 24
CACHES = ("uniform", "elastic-cache", "prefixkv")
KINDS = (
    "none",
    *CACHES,
    "elastic-cache reference",
    "prefixkv reference",
    "lightvlm interval",
    "lightvlm none",
    *(f"lightvlm {cache}" for cache in CACHES),
    "prefixkv profile",
    "lightvlm interval profile",
    "lightvlm prefixkv profile",
    "snapkv",
    "pyramidkv",
    "streaming-llm",
    "tova",
    "h2o",
)
USUAL = [
    (0, "elastic-cache reference"),
    (10, "lightvlm interval"),
]
EVERY = [(number, kind) for number in range(9) for kind in KINDS]
ALSO = [*USUAL, (10, "lightvlm prefixkv profile"), (20, "lightvlm elastic-cache")]
WHOLE = [*(pair for pair in ALSO if pair not in EVERY), *EVERY]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"number", "kind"} <= set(metafunc.fixturenames):
        whole = metafunc.config.getoption("--whole")
        metafunc.parametrize(("number", "kind"), WHOLE if whole else USUAL)


def draw_settings(chance: random.Random, kind: str, layers: int) -> tuple[str, Settings]:
    """Recipe and settings; room for the whole cache, so that one bundle serves every ratio."""
    recipe, _, variant = kind.removesuffix(" profile").partition(" ")
    settings: Settings = {} if kind == "none" or variant == "none" else {"kv_keep": 1.0}
    if variant == "reference":
        settings["semantics"] = "reference"
    if recipe == "lightvlm":
        settings |= {"kv": variant} | _merging(chance, layers)
    if variant == "interval":
        settings["kv_floor"] = chance.randrange(0, 20)
        settings["kv_protect"] = chance.randrange(1, 10)
        settings["kv_interval"] = chance.randrange(3, 17)
    if recipe in CACHES:
        settings["distance"] = chance.randrange(1, 30)
    if recipe == "pyramidkv":
        settings["beta"] = chance.choice([1, 2, 20])
    if recipe in ("snapkv", "pyramidkv"):
        settings["window"] = chance.randrange(1, 12)
        settings["kernel"] = chance.choice([1, 3, 5, 7])
        settings["pool"] = chance.choice(["mean", "max"])
    if recipe in ("tova", "h2o"):
        settings["kv_interval"] = chance.choice([1, 1, 5])
    if recipe == "h2o":
        settings["recent"] = chance.randrange(1, 10)
    if recipe in ("snapkv", "pyramidkv", "streaming-llm", "tova", "h2o"):
        settings["kv_sinks"] = chance.choice([0, 2, 4])
        if chance.random() < 0.3:
            settings["kv_cap"] = chance.randrange(20, 60)
        return recipe, settings
    if settings and variant != "none":
        settings["kv_sinks"] = chance.choice([1, 2, 3] if variant == "reference" else [0, 2, 3, 5])
        settings["positions"] = chance.choice(["true", "true", "layer0"])
        if variant != "reference" and chance.random() < 0.3:
            settings["kv_cap"] = chance.randrange(20, 60)
    return recipe, settings


def _merging(chance: random.Random, layers: int) -> Settings:
    count = chance.randrange(1, layers)
    settings: Settings = {
        "stages": sorted(chance.sample(range(1, layers), count)),
        "importance": chance.choice(["last", "text", "both"]),
        "merge": chance.choice(["recycle", "recycle", "nearest", "illava", "drop"]),
    }
    if settings["merge"] in ("recycle", "illava"):
        settings |= {"recycle": chance.choice([0.1, 0.3]), "absorb": chance.randrange(1, 7)}
    return settings


def draw_ratios(chance: random.Random, kind: str, stages: int) -> list[dict[str, Any]]:
    """Anything, everything, next to nothing (one token of an image left), and a share that gives
    halves of odd counts."""
    found: list[dict[str, Any]] = [{}, {}, {}, {}]
    if kind != "none" and not kind.endswith(" none"):
        shares = (chance.uniform(0.1, 0.9), 1.0, 0.05, 0.5)
        for ratios, kv_keep in zip(found, shares, strict=True):
            ratios["kv_keep"] = kv_keep
    if stages:
        falling = sorted((chance.uniform(0.05, 1) for _ in range(stages)), reverse=True)
        for ratios, keep in zip(found, (falling, 1.0, 1e-6, [0.3] * stages), strict=True):
            ratios["keep"] = keep
    return found if found[0] else found[:1]


def test_drawn(
    number: int,
    kind: str,
    checkpoint: Callable[[str], Path],
    bundle: Callable[..., Path],
    shared: Path,
    pytestconfig: pytest.Config,
) -> None:
    name = f"{PREFIX}{number}"
    twin = Twin(checkpoint(name))
    chance = random.Random(f"{number} {kind}")
    recipe, settings = draw_settings(chance, kind, len(twin.text.layers))
    if kind.endswith(" profile"):
        file = shared / f"profiles/drawn-{number}.json"
        write_profile(file, checkpoint(name), len(twin.text.layers), settings.pop("kv_keep"))
        settings["kv_profile" if recipe == "lightvlm" else "profile"] = str(file)
    folder = bundle(name, recipe, *arguments(settings), max_images=2)
    ratios = draw_ratios(chance, kind, len(settings.get("stages", [])))
    for own in ratios if pytestconfig.getoption("--whole") else ratios[::2]:
        answers = compare_steps(
            folder,
            twin,
            lambda own=own: rule_of(recipe, settings, folder, **own),
            ROWS,
            COUNT,
            **own,
        )
        assert len({tuple(answer.tokens) for answer in answers}) > 2, (settings, own)
