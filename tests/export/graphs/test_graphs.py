"""Every graph of every bundle: well-formed and portable; engines: tests/plugins_trt/."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import onnx
import pytest
from bundles import CACHED_USUAL, EXPORTED, LIGHT
from settings import CACHED, LIGHTVLM

from lvlm.runtime.bundle.reader import read_bundle

MODELS = ["digits-llava", *EXPORTED]
VARIANTS = [
    *((name, "none") for name in MODELS),
    *((name, "lightvlm") for name in LIGHT),
    *CACHED_USUAL,
]


def make(bundle: Callable[..., Path], name: str, recipe: str) -> Path:
    return bundle(name, *({"lightvlm": LIGHTVLM} | CACHED).get(recipe, (recipe,)), max_images=2)


@pytest.mark.parametrize(("name", "recipe"), VARIANTS)
def test_checker_accepts_every_graph(name: str, recipe: str, bundle: Callable[..., Path]) -> None:
    folder = make(bundle, name, recipe)
    for graph in read_bundle(folder).graphs.values():
        onnx.checker.check_model(str(folder / graph.file), full_check=True)


@pytest.mark.parametrize(("name", "recipe"), VARIANTS)
def test_weights_are_stored_once_and_used_as_they_lie(
    name: str, recipe: str, bundle: Callable[..., Path]
) -> None:
    folder = make(bundle, name, recipe)
    places: dict[str, tuple[int, int]] = {}
    for graph in read_bundle(folder).graphs.values():
        model = onnx.load(folder / graph.file, load_external_data=False)
        external = {}
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                info = {e.key: e.value for e in tensor.external_data}
                assert info["location"] == "weights.bin"
                external[tensor.name] = (int(info["offset"]), int(info["length"]))
            else:
                assert len(tensor.raw_data) < 4096, tensor.name
        assert external or graph.file == "compact.onnx"  # which has no weights
        for tensor_name, place in external.items():
            assert places.setdefault(tensor_name, place) == place
        for node in model.graph.node:
            if node.op_type == "Transpose":
                assert node.input[0] not in external, "folded at load into a copy per session"
    ends = sorted((offset, offset + length) for offset, length in set(places.values()))
    assert all(a[1] <= b[0] for a, b in pairwise(ends))
    assert (folder / "weights.bin").stat().st_size == ends[-1][1]


@pytest.mark.parametrize("name", LIGHT)
def test_prefill_merges_once_per_stage_and_compacts_every_layer(
    name: str, bundle: Callable[..., Path]
) -> None:
    folder = make(bundle, name, "lightvlm")
    manifest = read_bundle(folder)
    model = onnx.load(folder / "prefill.onnx", load_external_data=False)
    kinds = [(n.domain, n.op_type) for n in model.graph.node]
    stages = len(manifest.reductions)
    assert stages >= 1
    assert kinds.count(("lvlm", "TokenMerge")) == stages
    assert kinds.count(("lvlm", "TokenImportance")) == stages
    layers = manifest.text.layers
    for op in ("CausalAttention", "CacheImportance", "CacheCompact"):
        assert kinds.count(("lvlm", op)) == layers
    assert {f.name for f in model.functions} == {name for d, name in kinds if d == "lvlm"}
    assert {n.domain for n in model.graph.node} <= {"", "lvlm"}
    assert {d for f in model.functions for n in f.node for d in [n.domain]} <= {"", "lvlm"}
    outputs = [p.name for p in manifest.graphs["prefill"].outputs]
    assert [n for n in outputs if n.startswith("merge_map")] == [
        f"merge_map_{i}" for i in range(stages)
    ]
