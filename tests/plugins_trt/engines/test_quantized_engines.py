"""Engines with quantized weights, built by TensorRT-RTX ahead of time: the weights stay packed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from settings import SMALL

from lvlm.core.discovery import discover
from lvlm.core.progress import Progress
from lvlm.export.targets import trt_rtx
from lvlm.export.targets.description import PACKED, SignedWeights
from lvlm.export.targets.target import Target
from lvlm.plugins_trt.engines import engine_builder
from lvlm.plugins_trt.engines.engine_plan import make_plan
from lvlm.plugins_trt.engines.engine_request import BuildRequest
from lvlm.plugins_trt.engines.graph_protos import read_proto
from lvlm.plugins_trt.engines.held_weights import held_weights
from lvlm.plugins_trt.engines.lowered_graphs import lower_bundle
from lvlm.plugins_trt.engines.shape_profiles import EngineLimits, parse_batch, profiles, shapes
from lvlm.plugins_trt.engines.shared_weights import bytes_of, shared_matrices, stored_weights
from lvlm.plugins_trt.engines.tensorrt_builder import BuildSettings, Built, open_tensorrt
from lvlm.runtime.bundle.manifest import Capacity
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.kv.static_capacity import static_capacity

pytest.importorskip("tensorrt_rtx")

RTX = trt_rtx.TARGET
TARGETS: dict[str, Target] = discover("lvlm.export.targets", "TARGET")
# Scales as TensorRT asks them to be: products have sums of their rows added
POSITIVE = dataclasses.replace(RTX, signed=SignedWeights(PACKED))
BUNDLES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": (SMALL, {"weights": "int4", "block_size": 16}),
    "int8": ("digits-llava", {"weights": "int8", "block_size": "all"}),
}
HIDDEN, INNER, LAYERS = 1024, 2048, 3


def quantized(folder: Path, bits: int, block: int, *, zeros: bool, whole: bool) -> Path:
    """Layers of two linears in fp16, as a canonical graph of a bundle has them; random numbers."""
    draws = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: list[TensorProto] = []
    x = "x"
    middle, kinds = 1 << bits - 1, {4: TensorProto.UINT4, 8: TensorProto.UINT8}
    with (folder / "weights.bin").open("wb") as file:

        def store(name: str, kind: int, dims: tuple[int, int], data: bytes) -> str:
            tensor = TensorProto(name=name, data_type=kind, dims=dims)
            tensor.data_location = TensorProto.EXTERNAL
            places = (("location", "weights.bin"), ("offset", file.tell()), ("length", len(data)))
            for key, value in places:
                tensor.external_data.add(key=key, value=str(value))
            constants.append(tensor)
            file.write(data)
            return name

        for layer in range(LAYERS):
            for inputs, outputs in ((HIDDEN, INNER), (INNER, HIDDEN)):
                name, blocks = f"{layer}.{inputs}", inputs // block
                numbers = draws.integers(0, 256, outputs * inputs * bits // 8, np.uint8)
                scales = draws.normal(0, 1, (outputs, 1 if whole else blocks)).astype(np.float16)
                scales = np.repeat(scales, blocks // scales.shape[1], axis=1)
                points = np.full(outputs * blocks * bits // 8, middle * (17 if bits == 4 else 1))
                if zeros:
                    points = draws.integers(0, 256, points.shape)
                of_blocks = (outputs, blocks)
                given = [
                    store(f"{name}.w", kinds[bits], (outputs, inputs), numbers.tobytes()),
                    store(f"{name}.s", TensorProto.FLOAT16, of_blocks, scales.tobytes()),
                    store(f"{name}.z", kinds[bits], of_blocks, points.astype(np.uint8).tobytes()),
                ]
                nodes += [
                    helper.make_node(
                        "DequantizeLinear", given, [f"{name}.d"], axis=1, block_size=block
                    ),
                    helper.make_node("Transpose", [f"{name}.d"], [f"{name}.t"], perm=[1, 0]),
                    helper.make_node("MatMul", [x, f"{name}.t"], [f"{name}.y"]),
                    helper.make_node("Relu", [f"{name}.y"], [f"{name}.x"]),
                ]
                x = f"{name}.x"
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["b", 1, HIDDEN])
        for name in ("x", x)
    ]
    graph = helper.make_graph(nodes, "stack", ports[:1], ports[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.save(onnx.shape_inference.infer_shapes(model), folder / "g.onnx")
    return folder / "g.onnx"


# What the builder may add to packed weights: kernels; what it computes in: 8 MB for any product
CODE, ROOM = 1_500_000, 9_000_000


@pytest.mark.parametrize(
    ("bits", "block", "target", "zeros"),
    [(4, 32, RTX, False), (4, 128, POSITIVE, False), (4, 16, RTX, True), (8, 32, RTX, False)],
)
def test_weights_stay_packed(
    bits: int, block: int, target: Target, zeros: bool, tmp_path: Path
) -> None:
    """In the engine, and in the memory that it computes in."""
    path = quantized(tmp_path, bits, block, zeros=zeros, whole=bits == 8)
    file, own = target.write(tmp_path, {"g": path.name}, Capacity(1, 1, ()))
    numbers = 2 * LAYERS * HIDDEN * INNER
    scales = numbers // (HIDDEN if bits == 8 else block) * 2
    over = target is POSITIVE or zeros or bits == 8  # some scales are below zero
    packed = numbers * bits // 8 + scales * (2 if over else 1)
    assert (tmp_path / own).stat().st_size < packed + 4096 * 6 * LAYERS
    held = estimated(path, target)
    assert held == sizes(tmp_path / file)
    extents = {"x": ((1, 1, HIDDEN), (1, 1, HIDDEN), (4, 1, HIDDEN))}
    built = open_tensorrt("tensorrt-rtx").build(tmp_path / file, BuildSettings(extents, sms=(86,)))
    assert held < built.engine.nbytes < min(held, packed) + CODE
    assert built.activations is not None
    assert built.activations < ROOM


def estimated(path: Path, target: Target) -> int:
    """Bytes that an engine of a canonical graph holds of weights, before that is lowered."""
    stored = {t.name: bytes_of(t) for t in read_proto(path).graph.initializer}
    return held_weights(path, stored, (), target.signed)


def sizes(path: Path, shared: Collection[str] = ()) -> int:
    """Bytes of the weights of a lowered graph, but for those that are inputs."""
    tensors = read_proto(path).graph.initializer
    return sum(bytes_of(t).bytes for t in tensors if t.external_data and t.name not in shared)


@pytest.mark.parametrize("which", BUNDLES)
def test_decode_of_a_bundle_builds(which: str, bundle: Callable[..., Path], tmp_path: Path) -> None:
    """Every input reaches a layer, or the builder raises; of the weights the embedding alone is
    one."""
    name, options = BUNDLES[which]
    folder = tmp_path / "bundle"
    shutil.copytree(bundle(name, dtype="fp16", max_images=2, **options), folder)
    built = decode_of(folder)
    assert [weight.name.rpartition(".")[0][-12:] for weight in built.weights] == ["embed_tokens"]
    assert built.activations is not None
    assert built.activations < ROOM
    assert RTX.weights_file in read_bundle(folder).files


def decode_of(folder: Path) -> Built:
    manifest = lower_bundle(folder, read_bundle(folder), RTX, Progress(0, quiet=True))
    shared = shared_matrices(stored_weights(folder, manifest))
    graph, profile = (
        manifest.graphs["decode"],
        profiles(manifest, EngineLimits(parse_batch("1..2"))),
    )
    extents = shapes(graph, profile["decode"], static_capacity(manifest).per_layer)
    settings = BuildSettings(extents, shared, sms=(86,))
    return open_tensorrt("tensorrt-rtx").build(folder / RTX.file(graph.file), settings)


@pytest.mark.parametrize(
    ("which", "name"), [("int4", "trt-rtx"), ("int4", "jetson-jp72"), ("int8", "trt-rtx")]
)
def test_a_dry_run_knows_what_engines_hold(
    which: str, name: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """All engines their own packed weights, to the byte; the embedding once."""
    model, options = BUNDLES[which]
    folder = tmp_path / "bundle"
    shutil.copytree(bundle(model, dtype="fp16", max_images=2, **options), folder)
    target = TARGETS[name]
    plan = make_plan(BuildRequest(bundle=folder, target=target), dry_run=True)
    manifest = lower_bundle(folder, plan.manifest, target, Progress(0, quiet=True))
    for graph, held in plan.memory.inside.items():
        assert held == sizes(folder / target.file(manifest.graphs[graph].file), plan.shared)
    (embedding,) = plan.shared.values()
    assert plan.memory.shared == embedding.bytes


WHOLE = [
    ("digits-llava", ("none",), {"weights": "int4"}),
    ("digits-llava", ("lightvlm", "kv=none"), {"weights": "int8", "block_size": "all"}),
    (SMALL, ("snapkv",), {"weights": "int4", "block_size": 16}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe", "options"), WHOLE)
def test_every_engine_of_a_bundle_builds(
    name: str,
    recipe: tuple[str, ...],
    options: dict[str, Any],
    bundle: Callable[..., Path],
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    if not pytestconfig.getoption("--whole"):
        pytest.skip("decode alone in a normal run; --whole: all engines")
    folder = tmp_path / "bundle"
    shutil.copytree(bundle(name, *recipe, dtype="fp16", max_images=2, **options), folder)
    request = BuildRequest(bundle=folder, target=RTX, batch="1..2", sm=(86, 89, 120))
    engines = engine_builder.build(make_plan(request), Progress(0, quiet=True))
    assert set(engines.graphs) == set(read_bundle(folder).graphs)
    assert not engines.graphs["vision"].weights
