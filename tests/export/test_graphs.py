"""Every graph of every bundle: well-formed, portable, taken by TensorRT-RTX's builder."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import onnx
import pytest
from conftest import CACHED, CACHED_USUAL, TINY

from lvlm.export.targets import _trt_gate
from lvlm.export.targets._base import target_file
from lvlm.runtime.bundle import Manifest, read_bundle

MODELS = ["tiny-llava", *TINY]
VARIANTS = [
    *((name, recipe) for name in MODELS for recipe in ("none", "lightvlm")),
    *CACHED_USUAL,
]
# TensorRT builds per type; one architecture in fp16, all in fp32 as the parity tests have them.
GATED = [
    *((name, recipe, "fp32") for name, recipe in VARIANTS),
    ("tiny-llava", "none", "fp16"),
    ("tiny-llava", "lightvlm", "fp16"),
    ("tiny-llava", "elastic-cache (cached)", "fp16"),
]


def make(bundle: Callable[..., Path], name: str, recipe: str, dtype: str = "fp32") -> Path:
    return bundle(name, *CACHED.get(recipe, (recipe,)), dtype=dtype, max_images=2)


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


@pytest.mark.parametrize("name", MODELS)
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


@pytest.mark.parametrize(("name", "recipe", "dtype"), GATED)
def test_tensorrt_rtx_builds_every_lowered_graph(
    name: str, recipe: str, dtype: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """A real parse and build, ahead of time on the CPU, with every input consumed."""
    pytest.importorskip("tensorrt_rtx")
    import shutil

    from lvlm.export.targets.trt_rtx import TARGET

    folder = tmp_path / "bundle"
    shutil.copytree(make(bundle, name, recipe, dtype), folder)
    manifest = read_bundle(folder)
    TARGET.write(folder, {n: g.file for n, g in manifest.graphs.items()}, manifest.capacity)
    for graph_name, graph in manifest.graphs.items():
        file = folder / target_file(graph.file, TARGET.name)
        onnx.checker.check_model(str(file))
        engine = _trt_gate.build(file, profiles(manifest, graph_name))
        assert engine.nbytes > 0


def profiles(manifest: Manifest, graph: str) -> _trt_gate.Profiles:
    """Shapes from the manifest's lengths: one row up to two."""
    tokens = manifest.images.tokens
    longest = manifest.capacity.max_text_len + tokens
    sizes: dict[str, tuple[int, int, int]] = {
        "batch": (1, 1, 2),
        "sequence": (2, tokens + 32, longest),
        "images": (1, 1, 2),
        "images_per_row": (1, 1, 2),
    }
    for stage in range(len(manifest.reductions)):
        sizes[f"kept_{stage}"] = (1, tokens // 3 + 1, tokens)
        sizes[f"centres_{stage}"] = (1, tokens // 30 + 1, tokens // 10 + 1)
        sizes[f"length_{stage}"] = (2, tokens, longest)
    for layer, capacity in enumerate(manifest.capacity.per_layer):
        sizes[f"entries_{layer}"] = (1, min(capacity, tokens) // 2, capacity)
    found = {}
    for port in manifest.graphs[graph].inputs:
        dims = [
            (manifest.capacity.per_layer[int(d.rpartition("_")[2])],) * 3
            if isinstance(d, str) and d.startswith("capacity_")
            else sizes[d]
            if isinstance(d, str)
            else (d, d, d)
            for d in port.dims
        ]
        found[port.name] = tuple([d[i] for d in dims] for i in range(3))
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["tiny-llava", "llava:llama-mha-bias-rope3-siglip"])
def test_lowered_graphs_compute_the_same(
    name: str, bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trt-rtx graphs in the canonical ones' place, on ONNX Runtime."""
    import dataclasses
    import shutil

    import numpy as np
    from conftest import ASSETS

    import lvlm
    from lvlm.export.targets.trt_rtx import TARGET
    from lvlm.runtime import engine
    from lvlm.runtime.answers import Options
    from lvlm.runtime.bundle import File
    from lvlm.runtime.integrity import sha256_of

    original = make(bundle, name, "lightvlm")
    folder = tmp_path / "bundle"
    shutil.copytree(original, folder)
    manifest = read_bundle(folder)
    TARGET.write(folder, {n: g.file for n, g in manifest.graphs.items()}, manifest.capacity)
    files = dict(manifest.files)
    for graph in manifest.graphs.values():
        (folder / target_file(graph.file, TARGET.name)).replace(folder / graph.file)
        path = folder / graph.file
        if graph.file != "compact.onnx":  # the only one without attention
            assert "lvlm.lowered" in path.read_bytes().decode("latin-1")
        files[graph.file] = File(sha256_of(path), path.stat().st_size)
    dataclasses.replace(manifest, files=files).write(folder)

    def logits(where: Path) -> list[np.ndarray]:
        with lvlm.load(where) as model:
            prompts = ["Read the top row.", "How often does 7 appear?"]
            pictures = [[ASSETS / "samples/digits-1.png"], []]
            options = Options()
            rows = [
                model.prepare(0, p, images, options)
                for p, images in zip(prompts, pictures, strict=True)
            ]
            batch = model.engine.start(rows)
            found = [batch.logits.copy()]
            for _ in range(3):
                for row in batch.rows:
                    row.tokens.append(5)
                batch.decode_step()
                found.append(batch.logits.copy())
            return found

    expected = logits(original)
    monkeypatch.setattr(engine, "CAPACITY_STEP", 10**6)  # these graphs take full buffers only
    for ours, theirs in zip(logits(folder), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
