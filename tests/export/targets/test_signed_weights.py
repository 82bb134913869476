"""Quantized weights as TensorRT takes them: the numbers of the bundle, signed; nothing is rounded
anew."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from linear_graphs import make_store, random_values, save_checkpoint, traced
from lowering_tools import TARGETS, canonical_alone, in_place, logits, lowered
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from settings import SMALL

from lvlm.core.errors import ExportError
from lvlm.core.progress import Progress
from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor, Unpacked
from lvlm.export.weights.quantization import WeightQuantization
from lvlm.export.weights.weight_steps import weight_steps
from lvlm.export.weights.weights_file import WeightsFile
from lvlm.plugins_trt.engines.lowered_graphs import lower_bundle
from lvlm.runtime.bundle.manifest import Capacity
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.engine import calls

INPUTS = 192
SHAPES = {"q.weight": (6, INPUTS), "k.weight": (2, INPUTS), "o.weight": (4, INPUTS)}
# q and k lie side by side in one weight; o is read as it lies
BODY = """
    qt = Transpose<perm = [1, 0]>(q.weight) qx = MatMul(x, qt) q = Relu(qx)
    kt = Transpose<perm = [1, 0]>(k.weight) kx = MatMul(x, kt) k = Relu(kx)
    first = Constant<value_int = 0>() row = Gather<axis = 1>(x, first)
    o = Gemm<transB = 1>(row, o.weight)
"""
OUTPUTS = "float[2, n, 6] q, float[2, n, 2] k, float[2, 4] o"
ANY = "trt-rtx"  # takes any scale
POSITIVE = "trt-10"  # takes positive scales only
ROUNDED: dict[str, WeightQuantization] = {
    "int4": WeightQuantization(4, 32),
    "int4-16": WeightQuantization(4, 16),
    "int8": WeightQuantization(8, 32, whole=True),
}
# Bits, groups of an output, zero points or not
COME: dict[str, tuple[int, int, bool]] = {
    "zeros": (4, 6, True),
    "one-group": (8, 1, False),
    "one-group-zeros": (8, 1, True),
}
X = np.random.default_rng(1).normal(size=(2, 5, INPUTS)).astype(np.float32)
KINDS = [*ROUNDED, *COME]


def packed(bits: int, groups: int, zeros: bool) -> dict[str, PackedTensor]:
    rng, found = np.random.default_rng(3), {}
    for name, (outputs, inputs) in SHAPES.items():
        points = torch.from_numpy(rng.integers(0, 2**bits, (outputs, groups), np.uint8))
        parts = Unpacked(
            torch.from_numpy(rng.integers(0, 2**bits, (outputs, inputs), np.uint8)),
            torch.from_numpy(rng.uniform(0.01, 0.1, (outputs, groups)).astype(np.float32)),
            points if zeros else None,
        )
        found[name] = PackedTensor((outputs, inputs), bits, groups, not zeros, lambda _, p=parts: p)
    return found


def write(folder: Path, kind: str) -> Path:
    """g.onnx with weights of a kind, as an export writes it."""
    values = random_values(SHAPES)
    values["q.weight"][0, :32] = 0  # its scale is 0
    graph = traced(BODY, OUTPUTS, values, width=INPUTS)
    checkpoint = save_checkpoint(folder, values)
    store = make_store([graph], checkpoint)
    how, come = ROUNDED.get(kind), None if kind in ROUNDED else packed(*COME[kind])
    for step in weight_steps(how, list(SHAPES), come):
        step.apply([graph], store)
    weights = WeightsFile.of(store)
    weights.attach([graph])
    weights.write(folder, checkpoint, lambda _: None)
    ir.save(graph.model, folder / "g.onnx")
    return folder / "g.onnx"


def lower(path: Path, target: str) -> Path:
    written = TARGETS[target].write(path.parent, {"g": path.name}, Capacity(1, 1, ()))
    assert written == [f"g.{target}.onnx", f"weights.{target}.bin"]
    return path.with_name(written[0])


def spread(path: Path) -> dict[str, np.ndarray]:
    """What every DequantizeLinear of a graph gives [N,K], by the name of its numbers: as ONNX's
    reference computes it."""
    model = onnx.load(path)
    constants = {t.name: t for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            given = [constants[name] for name in node.input]
            output = helper.make_tensor_value_info(node.output[0], given[1].data_type, None)
            graph = helper.make_graph([node], "g", [], [output], given)
            opset = [helper.make_opsetid("", 21)]
            alone = helper.make_model(graph, opset_imports=opset, ir_version=10)
            found[given[0].name] = ReferenceEvaluator(alone).run(None, {})[0]
    return found


def run(path: Path) -> list[np.ndarray]:
    """The results on X, without the fusions that round rows to 8 bits."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    found: list[np.ndarray] = onnxruntime.InferenceSession(path, options).run(None, {"x": X})
    return found


def products(weights: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The results of BODY on X."""
    q, k = (X @ w.T for name, w in weights.items() if "[" in name)
    (o,) = (w for name, w in weights.items() if "[" not in name)
    return [np.maximum(q, 0), np.maximum(k, 0), X[:, 0] @ o.T]


def apart(whole: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights that lie side by side, one by one, as lowered graphs name them."""
    found = {}
    for name, values in whole.items():
        if "+" in name:
            found |= {f"{name}[0:6].signed": values[:6], f"{name}[6:8].signed": values[6:]}
        else:
            found[f"{name}.signed"] = values
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_signed_numbers_stand_for_the_same_weights(kind: str, tmp_path: Path) -> None:
    """Bit for bit where nothing is left over; the products are the same."""
    path = write(tmp_path, kind)
    wanted = apart(spread(path))
    results = products(wanted)
    for target in (ANY, POSITIVE):
        file = lower(path, target)
        model = onnx.load(file)
        constants = {t.name: t for t in model.graph.initializer}
        left = {n.removesuffix(".left_over"): t for n, t in constants.items() if "left" in n}
        found = spread(file)
        assert found.keys() == wanted.keys()
        for name, values in found.items():
            assert constants[name].data_type in (TensorProto.INT4, TensorProto.INT8)
            over = left.get(name.removesuffix(".signed"))
            if over is None:
                assert (values == wanted[name]).all()
                continue
            constant = numpy_helper.to_array(over).T
            whole = values + np.repeat(constant, INPUTS // constant.shape[1], axis=1)
            np.testing.assert_allclose(whole, wanted[name], rtol=0, atol=2e-6)
        has_zeros = kind.endswith("zeros")
        assert bool(left) == (has_zeros or (target == POSITIVE and kind.startswith("int4")))
        nodes = {n.op_type: n for n in model.graph.node}
        spreading = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
        assert {len(n.input) for n in spreading} == {2}
        scales = [numpy_helper.to_array(constants[n.input[1]]) for n in spreading]
        assert all((s > 0).all() for s in scales) or (
            target == ANY and kind in ("int4", "int4-16", "zeros")
        )
        assert {s.ndim for s in scales} == {1 if "8" in kind or "group" in kind else 2}
        assert "Split" not in nodes
        onnx.checker.check_model(file, full_check=True)
        for ours, theirs in zip(run(file), results, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=3e-6 * np.abs(theirs).max())


def test_numbers_stay_packed_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "int4")
    model = onnx.load(lower(path, ANY), load_external_data=False)
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_type == TensorProto.INT4:
            assert place["location"] == f"weights.{ANY}.bin"
            assert int(place["length"]) == np.prod(tensor.dims) // 2
    assert not any(t.data_type == TensorProto.UINT4 for t in model.graph.initializer)


@pytest.mark.parametrize(
    ("target", "how", "message"),
    [
        ("jetson-orin-jp62", WeightQuantization(4, 32), "jetson-orin-jp62 does not take int4 weig"),
        ("ort-cuda", WeightQuantization(4, 32), "ort-cuda does not take quantized weights"),
        ("trt-11", WeightQuantization(8, 32), "trt-11 takes int8 weights with one scale for each "),
    ],
)
def test_what_a_target_does_not_take_is_refused_by_name(
    target: str, how: WeightQuantization, message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(ROUNDED, "this", how)
    path = write(tmp_path, "this")
    with pytest.raises(ExportError, match=f"^target {message}") as caught:
        TARGETS[target].write(tmp_path, {"g": path.name}, Capacity(1, 1, ()))
    assert "export with" in str(caught.value)
    assert not list(tmp_path.glob(f"*{target}*"))


def test_weights_may_lie_behind_a_link(bundle: Callable[..., Path], tmp_path: Path) -> None:
    """As those of a bundle in the hub's cache do."""
    original = bundle(SMALL, dtype="fp16", max_images=2, weights="int4", block_size=16)
    folder = Path(shutil.copytree(original, tmp_path / "bundle"))
    file = folder / "weights.bin"
    file.symlink_to(file.rename(tmp_path / "blob"))
    lower_bundle(folder, read_bundle(folder), TARGETS[ANY], Progress(0, quiet=True))
    assert (folder / str(TARGETS[ANY].weights_file)).stat().st_size > 0


def test_a_lowered_bundle_answers_as_it_did(
    bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp16, with a tied head and biases; scales below zero leave sums over."""
    original = bundle(SMALL, dtype="fp16", max_images=2, weights="int4", block_size=16)
    expected = logits(canonical_alone(Path(shutil.copytree(original, tmp_path / "canonical"))))
    monkeypatch.setattr(calls, "CAPACITY_STEP", 10**6)
    for target in (TARGETS[ANY], TARGETS[POSITIVE]):
        folder = lowered(original, tmp_path / target.name, target)
        bits = {(spread(folder / target.file(f"{g}.onnx")) != {}) for g in ("prefill", "decode")}
        assert bits == {True}
        for ours, theirs in zip(logits(in_place(folder, target)), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=0.02 * np.abs(theirs).max())
