"""Engines of whole bundles, built by TensorRT-RTX ahead of time: no GPU is needed, or used."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import CACHED, CACHED_USUAL

from lvlm.export.progress import Progress
from lvlm.export.targets import trt_rtx, trt_rtx_turing
from lvlm.export.targets._base import Target
from lvlm.plugins_trt import engine_builder, tensorrt_builder
from lvlm.plugins_trt.engine_plan import make_plan
from lvlm.plugins_trt.engine_request import Request
from lvlm.plugins_trt.tensorrt_builder import Built, Settings, TensorRt
from lvlm.runtime.bundle import read_bundle
from lvlm.runtime.discovery import discover
from lvlm.runtime.engines import EngineSet
from lvlm.runtime.errors import BackendError

pytest.importorskip("tensorrt_rtx")

# Code for several generations in one engine costs little more than for one.
GENERATIONS = {trt_rtx.TARGET: (86, 89, 120), trt_rtx_turing.TARGET: (75,)}
RECIPES = {
    "none": ("none",),
    "lightvlm": ("lightvlm",),
    "elastic-cache": CACHED["elastic-cache (cached)"],
    "prefixkv": CACHED["prefixkv (cached)"],
    "uniform": CACHED["uniform (cached)"],
}


@pytest.fixture
def built_once(monkeypatch: pytest.MonkeyPatch) -> dict[str, Built]:
    """Graphs that are the same under several recipes (vision, often decode) are built once."""
    made: dict[str, Built] = {}
    build = TensorRt.build

    def remembered(self: TensorRt, model: Any, settings: Settings, show: Any) -> Built:
        key = hashlib.sha256(Path(model).read_bytes() + repr(settings).encode()).hexdigest()
        if key not in made:
            made[key] = build(self, model, settings, show)
        return made[key]

    monkeypatch.setattr(tensorrt_builder.TensorRt, "build", remembered)
    return made


def build(folder: Path, target: Target = trt_rtx.TARGET, **options: Any) -> EngineSet:
    request = Request(bundle=folder, target=target, batch="1..2", **options)
    return engine_builder.build(make_plan(request), Progress(0, quiet=True))


def copied(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder))


def test_the_recipes_are_all_recipes() -> None:
    assert set(RECIPES) == set(discover("lvlm.export.recipes", "RECIPE"))


@pytest.mark.parametrize("model", ["tiny-llava", "llava:qwen2-tied-siglip"])
def test_every_recipe_builds_for_every_generation(
    model: str, bundle: Callable[..., Path], tmp_path: Path, built_once: dict[str, Built]
) -> None:
    """In fp16, all that Turing takes."""
    for recipe, settings in RECIPES.items():
        folder = copied(bundle(model, *settings, dtype="fp16", max_images=2), tmp_path / recipe)
        for target, sms in GENERATIONS.items():
            engines = build(folder, target, sm=sms)
            manifest = read_bundle(folder)
            assert EngineSet.read(engines.folder) == engines
            assert set(engines.graphs) == set(manifest.graphs)
            assert ("compact" in engines.graphs) == (recipe == "lightvlm")
            for sm in sms:
                engines.check(
                    gpu_sm=sm,
                    gpu_name="",
                    version=engines.version,
                    plugin_hash=None,
                    manifest=manifest,
                )
            weights = {
                name: {weight.name for weight in graph.weights}
                for name, graph in engines.graphs.items()
            }
            assert weights["prefill"] == weights["decode"] != set()
            assert not weights["vision"]
    assert len(built_once) < 2 * sum(3 for _ in RECIPES)  # many of the recipes' graphs are one


@pytest.mark.parametrize(
    ("model", "recipe"),
    [("tiny-llava", "none"), *[x for x in CACHED_USUAL if x[0] != "tiny-llava"]],
)
def test_every_architecture_builds_in_fp32(
    model: str, recipe: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    settings = CACHED.get(recipe, (recipe,))
    engines = build(copied(bundle(model, *settings, max_images=2), tmp_path / "b"), sm=(86,))
    assert all(graph.bytes > 0 for graph in engines.graphs.values())


def test_embedded_weights_are_in_every_engine(bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = copied(bundle("llava:qwen2-tied-siglip", dtype="fp16", max_images=2), tmp_path / "b")
    apart = build(folder, sm=(86,))
    whole = build(folder, sm=(86,), weights="embedded", output=tmp_path / "whole")
    shared = {w.name: w.bytes for graph in apart.graphs.values() for w in graph.weights}
    for name in ("prefill", "decode"):
        saved = whole.graphs[name].bytes - apart.graphs[name].bytes
        assert saved > 0.9 * sum(shared.values())
        assert not whole.graphs[name].weights
    # A refusal leaves neither folder changed.
    with pytest.raises(BackendError, match="sm_86, this GPU is sm_89"):
        apart.check(
            gpu_sm=89,
            gpu_name="L4",
            version=apart.version,
            plugin_hash=None,
            manifest=read_bundle(folder),
        )
