"""Engines of whole bundles, built by TensorRT-RTX ahead of time: no GPU is needed, or used."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import CACHED_USUAL, OTHERS, TINY, moves
from example_counts import whole
from settings import AT_ENCODER, CACHED, LIGHTVLM, SMALL, for_model

from lvlm.core.discovery import discover
from lvlm.core.errors import BuildError
from lvlm.core.progress import Progress
from lvlm.export.recipes.lightvlm import LightVLM
from lvlm.export.recipes.recipe import Recipe
from lvlm.export.targets import trt_rtx, trt_rtx_turing
from lvlm.export.targets.target import Target
from lvlm.plugins_trt.engines import engine_builder, tensorrt_builder
from lvlm.plugins_trt.engines.engine_plan import make_plan
from lvlm.plugins_trt.engines.engine_request import BuildRequest
from lvlm.plugins_trt.engines.lowered_graphs import lower_bundle
from lvlm.plugins_trt.engines.shape_profiles import EngineLimits, parse_batch, profiles, shapes
from lvlm.plugins_trt.engines.shared_weights import shared_matrices, stored_weights
from lvlm.plugins_trt.engines.tensorrt_builder import (
    BuildSettings,
    Built,
    TensorRtBuilder,
    open_tensorrt,
)
from lvlm.runtime.bundle.engine_sets import EngineSet
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.kv.static_capacity import static_capacity

pytest.importorskip("tensorrt_rtx")

GENERATIONS = (75, 86, 89, 120)  # in one engine: that costs little more than for one of them
# Every recipe that has graphs of its own and is no preset, those with a cache with room for all
RECIPES = (
    {
        name: (name,)
        for name, kind in discover("lvlm.export.recipes", "RECIPE").items()
        if kind.encoder_reduction is Recipe.encoder_reduction and kind.__base__ is not LightVLM
    }
    | {settings[0]: settings for settings in CACHED.values() if settings[0] != "lightvlm"}
    | AT_ENCODER
    | {"lightvlm": LIGHTVLM}
    | {"importance=both": ("lightvlm", "importance=both", "kv=none")}
)


# In a normal run every family once in fp32, each with another cache policy, as other tests export
# them; in fp16, on few layers, the recipes that are not among those.
PAIRS = [pair for pair in CACHED_USUAL if pair[0] != "digits-llava"]
PAIRS += [(name, "none") for name in OTHERS if not moves(name)]
APART = ["none", *AT_ENCODER]
APART += [x.split()[0] for x in CACHED if "(cached)" in x and x not in {c for _, c in PAIRS}]
USUAL = [(SMALL, name) for name in APART]
KNOWN_FAULT = pytest.mark.xfail(
    raises=BuildError, reason="TensorRT-RTX 1.7: docs/tensorrt.md, Known faults", strict=True
)
FAULTS = [("qwen3-vl:mha-tied", "lightvlm")]


@pytest.fixture(scope="module")
def made() -> dict[str, Built]:
    return {}


@pytest.fixture
def built_once(made: dict[str, Built], monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that are the same under several recipes (vision, often decode) are built once."""
    build = TensorRtBuilder.build

    def remembered(self: TensorRtBuilder, model: Any, settings: BuildSettings, show: Any) -> Built:
        key = hashlib.sha256(Path(model).read_bytes() + repr(settings).encode()).hexdigest()
        if key not in made:
            made[key] = build(self, model, settings, show)
        return made[key]

    monkeypatch.setattr(tensorrt_builder.TensorRtBuilder, "build", remembered)


def build(folder: Path, target: Target = trt_rtx.TARGET, **options: Any) -> EngineSet:
    request = BuildRequest(bundle=folder, target=target, batch="1..2", **options)
    return engine_builder.build(make_plan(request), Progress(0, quiet=True))


def copied(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "built_once" in metafunc.fixturenames:
        pairs = [(model, name) for model in ("digits-llava", *TINY) for name in RECIPES]
        pairs = [p for p in pairs if p[0] not in TINY or p[1] == "none" or moves(p[0])]
        every = [pytest.param(*p, marks=KNOWN_FAULT if p in FAULTS else ()) for p in pairs]
        whole = metafunc.config.getoption("--whole")
        metafunc.parametrize(("model", "recipe"), every if whole else USUAL)
    if "read_by" in metafunc.fixturenames:
        # Compacted at intervals, with a ring of queries; entries that leave one by one
        every = ["lightvlm (cached)", "elastic-cache (cached)"]
        whole = metafunc.config.getoption("--whole")
        pairs = [("digits-llava", name) for name in every] if whole else [(SMALL, every[0])]
        metafunc.parametrize(("model", "read_by"), pairs)


@pytest.mark.usefixtures("built_once")
def test_every_recipe_builds_for_every_generation(
    model: str, recipe: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """In fp16, all that Turing takes."""
    folder = copied(
        bundle(model, *for_model(model, RECIPES[recipe]), dtype="fp16", max_images=2),
        tmp_path / "b",
    )
    engines = build(folder, trt_rtx_turing.TARGET, sm=GENERATIONS)
    manifest = read_bundle(folder)
    assert EngineSet.read(engines.folder) == engines
    assert set(engines.graphs) == set(manifest.graphs)
    assert ("compact" in engines.graphs) == (recipe in ("lightvlm", "tova", "h2o"))
    for sm in GENERATIONS:
        engines.check(
            gpu_sm=sm, gpu_name="", version=engines.version, plugin_hash=None, manifest=manifest
        )
    weights = {
        name: {weight.name for weight in graph.weights} for name, graph in engines.graphs.items()
    }
    assert weights["prefill"] == weights["decode"] != set()
    assert weights.get("extend", weights["decode"]) == weights["decode"]
    assert not weights["vision"]


@pytest.mark.parametrize(("architecture", "cached"), PAIRS)
def test_every_architecture_builds_in_fp32(
    architecture: str, cached: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """The first has biases and as many KV heads as heads. In a normal run without extend, whose
    layers are those of prefill, and compact, which no family's modules are in; of every other one
    prefill alone."""
    folder = copied(
        bundle(architecture, *CACHED.get(cached, (cached,)), max_images=2), tmp_path / "b"
    )
    if whole():
        engines = build(folder, sm=(86,))
        assert all(graph.bytes > 0 for graph in engines.graphs.values())
    else:
        apart = [] if PAIRS.index((architecture, cached)) % 2 else ["vision", "decode"]
        for built in graphs_of(folder, "prefill", *apart):
            assert built.engine.nbytes


def test_what_sessions_read_by_builds(
    model: str, read_by: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copied(bundle(model, *CACHED[read_by], max_images=2, sessions=True), tmp_path / "b")
    graphs = ["extend", *(["compact"] if read_by == "lightvlm (cached)" else [])]
    assert all(built.engine.nbytes for built in graphs_of(folder, *graphs))


def graphs_of(folder: Path, *names: str) -> Iterator[Built]:
    """The engines of some graphs of a bundle."""
    manifest = lower_bundle(folder, read_bundle(folder), trt_rtx.TARGET, Progress(0, quiet=True))
    profile = profiles(manifest, EngineLimits(parse_batch("1..2")))
    for name in names:
        graph = manifest.graphs[name]
        extents = shapes(graph, profile[name], static_capacity(manifest).per_layer)
        file = folder / trt_rtx.TARGET.file(graph.file)
        yield open_tensorrt("tensorrt-rtx").build(file, BuildSettings(extents, {}, sms=(86,)))


def test_matrices_as_inputs_are_not_in_the_engine(
    bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copied(bundle("digits-llava", dtype="fp16", max_images=2), tmp_path / "bundle")
    manifest = lower_bundle(folder, read_bundle(folder), trt_rtx.TARGET, Progress(0, quiet=True))
    shared = shared_matrices(stored_weights(folder, manifest))
    graph, profile = manifest.graphs["decode"], profiles(manifest, EngineLimits(parse_batch("1")))
    extents = shapes(graph, profile["decode"], static_capacity(manifest).per_layer)
    built = [
        open_tensorrt("tensorrt-rtx").build(
            folder / trt_rtx.TARGET.file(graph.file), BuildSettings(extents, weights, sms=(86,))
        )
        for weights in (shared, {})
    ]
    apart = sum(weight.nbytes for weight in built[0].weights)
    assert apart == sum(weight.bytes for weight in shared.values()) > 5_000_000
    parts = [weight.name for weight in built[0].weights if weight.columns]
    assert len(parts) == 5 * manifest.text.layers  # q, k, v; gate, up
    assert built[0].activations is not None
    assert 0 < built[0].activations < 2_000_000  # no copy of a weight
    assert built[1].weights == []
    assert built[1].engine.nbytes - built[0].engine.nbytes > 0.9 * apart
