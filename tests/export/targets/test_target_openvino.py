"""Target openvino: OpenVINO computes every op's contract from what the passes make of it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import openvino
import pytest
import torch
from single_node import feeds, session, single_node_model

from lvlm.core.discovery import discover
from lvlm.core.errors import ExportError
from lvlm.export.ops.op import Op, OpSample
from lvlm.export.targets.openvino import TARGET
from lvlm.export.targets.passes.graph_edits import inline_lowered
from lvlm.export.targets.passes.host_writes import leave_writes_to_host
from lvlm.export.targets.passes.loops import scans_to_loops
from lvlm.runtime.backends.openvino import SLOTS
from lvlm.runtime.bundle.manifest import Capacity

# CacheUpdate is for targets with plugins.
OPS: dict[str, Op] = {
    name: op for name, op in discover("lvlm.export.ops", "OP").items() if name != "CacheUpdate"
}
HALVES = (torch.float16, torch.bfloat16)
BF16 = 0.02  # of the largest number


@functools.cache
def core() -> openvino.Core:
    return openvino.Core()


def kinds() -> list[Any]:
    """A sample of every op, set of attributes and number of inputs, and one in fp16 of every op."""
    found: dict[object, tuple[Op, OpSample]] = {}
    for op in OPS.values():
        for sample in op.samples():
            half = any(t is not None and t.dtype in HALVES for t in sample.inputs)
            # Attributes that are numbers stay inputs of what is computed; others shape the graph.
            shaped = {k: v for k, v in sample.attributes.items() if not isinstance(v, float)}
            kind = "half" if half else f"{shaped} {sample.inputs.count(None)}"
            found.setdefault((op.name, kind), (op, sample))
    return [pytest.param(op, s, id=f"{op.name}: {s.name}") for op, s in found.values()]


def run(op: Op, sample: OpSample, folder: Path, precision: str) -> list[np.ndarray]:
    model = ir.serde.deserialize_model(single_node_model(op, sample))
    TARGET.lower(model, Capacity(1, 1, ()))
    proto = ir.to_proto(model)
    assert not proto.functions
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, folder / "model.onnx")
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
    compiled = core().compile_model(core().read_model(folder / "model.onnx"), "CPU", options)
    found = compiled(feeds(op, sample))
    return [found[number] for number in range(len(compiled.outputs))]


def assert_close(op: Op, sample: OpSample, got: list[np.ndarray], tolerance: float) -> None:
    expected = op(*sample.inputs, **sample.attributes)
    formals = op.schema.outputs[: len(expected)]
    for formal, want, have in zip(formals, expected, got, strict=True):
        if not want.is_floating_point():
            np.testing.assert_array_equal(have, want.numpy(), err_msg=formal.name)
            continue
        assert np.isfinite(have).all(), formal.name
        valid = ~sample.unspecified.get(formal.name, torch.zeros((), dtype=torch.bool)).numpy()
        difference = np.abs(have.astype(float) - want.double().numpy()) * valid
        limit = tolerance * max(1, float(want.double().abs().max()))
        assert difference.max(initial=0) <= limit, formal.name


@pytest.mark.parametrize(("op", "sample"), kinds())
def test_ops_compute_their_contract(op: Op, sample: OpSample, tmp_path: Path) -> None:
    floats = [t.dtype for t in sample.inputs if t is not None and t.is_floating_point()]
    dtype = floats[0] if floats else torch.float32
    assert_close(op, sample, run(op, sample, tmp_path, "f32"), op.tolerance[dtype])


@pytest.mark.parametrize("name", ["CausalAttention", "TokenImportance", "CacheImportance"])
def test_ops_compute_their_contract_in_bf16(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Those that rank nothing: in bf16 ranks that are near each other may change places."""
    able = "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if not (able and request.config.getoption("--whole")):
        pytest.skip("with --whole, on a CPU that computes in bf16")
    op = OPS[name]
    sample = next(iter(op.samples()))
    # What the contract wants in fp32, scores, is computed in bf16, too.
    assert_close(op, sample, run(op, sample, tmp_path, "bf16"), BF16)


def graph_of(body: str, inputs: str, outputs: str) -> ir.Model:
    text = f'<ir_version: 11, opset_import: ["" : 24]> g ({inputs}) => ({outputs}) {{ {body} }}'
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


CACHE = "float[B, 2, C, 4] past_k, float[B, 2, C, 4] past_v"
ENTRY = "float[B, 2, 1, 4] k, float[B, 2, 1, 4] v, int64[B] at"
WRITES = """
    present_k = TensorScatter <axis = -2> (past_k, k, at)
    present_v = TensorScatter <axis = -2> (past_v, v, at)
"""


@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 0.5])
def test_attention_beside_a_new_entry_is_attention_over_the_written_cache(
    kind: str, narrow: bool, softcap: float
) -> None:
    """Of grouped heads; slots in use and not, the new entry among them, at the end and beyond;
    ``narrow``: the cache may be in fp16 where the rest is not."""
    attend = f"y = Attention <softcap = {softcap}>"
    body = f"{WRITES} {attend} (q, present_k, present_v, mask)"
    if narrow:
        to = {"float": 1, "float16": 10}[kind]
        cast = f"kk = Cast <to = {to}> (present_k) vv = Cast <to = {to}> (present_v)"
        body = f"{WRITES} {cast} {attend} (q, kk, vv, mask)"
    given = f"float[B, 6, 1, 4] q, {ENTRY}, bool[B, 1, 1, C] mask, {CACHE}"
    outputs = "float[B, 6, 1, 4] y, float[B, 2, C, 4] present_k, float[B, 2, C, 4] present_v"
    given, outputs = (t.replace("float[", f"{kind}[") for t in (given, outputs))
    if narrow:
        given = given.replace(f"{kind}[B, 2", "float16[B, 2")
        outputs = outputs.replace(f"{kind}[B, 2", "float16[B, 2")
    whole = graph_of(body, given, outputs)
    random = np.random.default_rng(0)
    dtype, rows, slots = {"float": np.float32, "float16": np.float16}[kind], 4, 7
    shapes = {"q": (6, 1), "k": (2, 1), "v": (2, 1), "past_k": (2, slots), "past_v": (2, slots)}
    feed = {
        n: random.normal(size=(rows, *s, 4)).astype(np.float16 if narrow and n != "q" else dtype)
        for n, s in shapes.items()
    }
    feed["at"] = np.array([0, 3, 6, 5])
    lengths = np.array([1, 6, 7, 6])  # the cache holds the entry alone; overwritten; full; appended
    feed["mask"] = (np.arange(slots) < lengths[:, None])[:, None, None]
    expected = session(ir.to_proto(whole)).run(None, feed)
    assert leave_writes_to_host(whole) == 2
    inline_lowered(whole)
    proto = ir.to_proto(whole)
    onnx.checker.check_model(proto, full_check=True)
    assert [v.name for v in proto.graph.output] == ["y", "present_k", "present_v", SLOTS]
    y, k, v, at = session(proto).run(None, feed)
    np.testing.assert_allclose(y, expected[0], atol=1e-6 if kind == "float" else 4e-3)
    np.testing.assert_array_equal(k, feed["k"])
    np.testing.assert_array_equal(v, feed["v"])
    np.testing.assert_array_equal(at, [feed["at"]] * 2)


def test_caches_that_are_only_written_are_no_inputs() -> None:
    model = graph_of(WRITES, f"{ENTRY}, {CACHE}", "float[B, 2, C, 4] present_k, float[] present_v")
    assert leave_writes_to_host(model) == 2
    assert [value.name for value in model.graph.inputs] == ["k", "v", "at"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ('present_k = TensorScatter <mode = "circular"> (past_k, k, at)', "otherwise than"),
        ("present_k = TensorScatter (past_k, k)", "otherwise than"),
        ("w = TensorScatter (past_k, k, at) present_k = Neg (w)", "more than attention reads"),
        (
            "w = TensorScatter (past_k, k, at) present_k = Attention (k, w, w)",
            "without a mask",
        ),
    ],
)
def test_writes_that_cannot_be_left_to_the_host(body: str, why: str) -> None:
    model = graph_of(body, f"{ENTRY}, {CACHE}", "float[B, 2, C, 4] present_k")
    with pytest.raises(ExportError, match=why):
        leave_writes_to_host(model)


def test_a_buffer_that_is_made_otherwise_cannot_be_left_to_the_host() -> None:
    body = "present_k = TensorScatter (past_k, k, at) present_v = Neg (past_v)"
    outputs = "float[B, 2, C, 4] present_k, float[B, 2, C, 4] present_v"
    model = graph_of(body, f"{ENTRY}, {CACHE}", outputs)
    with pytest.raises(ExportError, match="not all of present_k, present_v are written"):
        leave_writes_to_host(model)


def test_a_scan_with_state_and_values_from_around_it_becomes_a_loop() -> None:
    body = """
        y, z = Scan <num_scan_inputs = 1, body = chunk (float[2] s, float[2] x) =>
            (float[2] t, float[2] u) { m = Mul (x, around) t = Add (s, m) u = Neg (t) }> (first, xs)
    """
    model = graph_of(
        body, "float[2] first, float[N, 2] xs, float[2] around", "float[2] y, float[N, 2] z"
    )
    random = np.random.default_rng(0)
    feed = {
        name: random.normal(size=shape).astype(np.float32)
        for name, shape in {"first": (2,), "xs": (5, 2), "around": (2,)}.items()
    }
    expected = session(ir.to_proto(model)).run(None, feed)
    assert scans_to_loops(model) == 1
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert "Scan" not in {node.op_type for node in proto.graph.node}
    for ours, theirs in zip(session(proto).run(None, feed), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
