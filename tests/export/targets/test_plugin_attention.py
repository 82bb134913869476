"""Which attention becomes ``CacheAttention``. That what it becomes computes the same on real graphs
is in test_lowered_graphs.py, with windows in test_another_family.py."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from lowering_tools import graph_of

from lvlm.export.targets.passes.plugin_attention import use_cache_attention

CONSTANTS = """
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    axis0 = Constant <value = int64[1] {0}> ()
    axis1 = Constant <value = int64[1] {1}> ()
    axes = Constant <value = int64[2] {1, 2}> ()
    w = Constant <value = int64 {7}> ()
"""
DECODE = """
    key = TensorScatter <axis = -2> (past_key, k, index)
    value = TensorScatter <axis = -2> (past_value, v, index)
    valid = Unsqueeze (length, axis1)
    size = Shape <start = 2, end = 3> (past_key)
    count = Squeeze (size)
    at = Range (zero, count, one)
    slots = Unsqueeze (at, axis0)
    below = Less (slots, valid)
    first = Sub (valid, w)
    near = GreaterOrEqual (slots, first)
    even = Equal (slots, valid)
"""
EXTEND = """
    old_key = Gather <axis = 2> (past_key, taken)
    old_value = Gather <axis = 2> (past_value, taken)
    key = Concat <axis = 2> (old_key, k)
    value = Concat <axis = 2> (old_value, v)
    present_key = TensorScatter <axis = -2> (past_key, k, index)
    present_value = TensorScatter <axis = -2> (past_value, v, index)
    columns = Unsqueeze (taken, axis0)
    entries = Unsqueeze (index, axis1)
    there = Less (columns, entries)
    size = Shape <start = 2, end = 3> (k)
    count = Squeeze (size)
    at = Range (zero, count, one)
    row = Unsqueeze (at, axis1)
    behind = Sub (row, at)
    causal = GreaterOrEqual (behind, zero)
    close = Less (behind, w)
    place = Add (entries, row)
    distance = Sub (place, columns)
    recent = Less (distance, w)
    both = And (there, recent)
    own = And (causal, close)
"""
KINDS = {
    "decode": (DECODE, "below", 0),
    "decode, window": (DECODE + "mask0 = And (below, near)", "mask0", 7),
    "decode, something else": (DECODE + "mask0 = And (below, even)", "mask0", None),
    "decode, slots in between": (DECODE, "near", None),
    "extend": (EXTEND + "mask0 = Concat <axis = -1> (there, causal)", "mask0", 0),
    "extend, window": (EXTEND + "mask0 = Concat <axis = -1> (both, own)", "mask0", 7),
    "extend, window here alone": (
        EXTEND + "mask0 = Concat <axis = -1> (there, own)",
        "mask0",
        None,
    ),
    "extend, window there alone": (
        EXTEND + "mask0 = Concat <axis = -1> (both, causal)",
        "mask0",
        None,
    ),
    "extend, other slots": (
        EXTEND.replace("(taken, axis0)", "(others, axis0)")
        + "mask0 = Concat <axis = -1> (there, causal)",
        "mask0",
        None,
    ),
}


def graph(kind: str, dtype: str = "float", heads: int = 4, width: int = 32) -> ir.Model:
    body, mask, _ = KINDS[kind]
    rows = 1 if kind.startswith("decode") else "T"
    new, cache = f"{dtype}[B, 2, {rows}, {width}]", f"{dtype}[B, 2, 40, {width}]"
    model = graph_of(
        f"{CONSTANTS} {body} mask = Unsqueeze ({mask}, axes) y = Attention (q, key, value, mask)",
        f"{dtype}[B, {heads}, {rows}, {width}] q, {new} k, {new} v, {cache} past_key, "
        f"{cache} past_value, int64[B] index, int64[B] length, int64[P] taken, int64[P] others",
        f"{dtype}[B, {heads}, {rows}, {width}] y",
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


def found(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "CacheAttention"]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_told_apart(kind: str) -> None:
    model, window = graph(kind), KINDS[kind][2]
    assert use_cache_attention(model) == int(window is not None)
    if window is None:
        assert "Attention" in {node.op_type for node in model.graph}
        return
    (node,) = found(model)
    assert node.attributes.get_int("window", -1) == window
    assert node.attributes.get_float("scale", 0) == pytest.approx(32**-0.5)
    written = [node.inputs[i].producer() for i in (1, 2)]
    assert [w.op_type for w in written if w] == ["TensorScatter"] * 2
    assert [w.inputs[0].name for w in written if w] == ["past_key", "past_value"]
    if kind.startswith("decode"):
        assert node.inputs[3].name == "length"
    else:  # no copy of the entries, no mask, and every input still read
        kinds = {n.op_type for n in model.graph}
        assert not kinds & {"Gather", "Concat", "Less", "GreaterOrEqual"}
        inputs = {value.name: value for value in model.graph.inputs}
        assert inputs["taken"].uses()
        assert inputs["index"].uses()


@pytest.mark.parametrize(("heads", "width"), [(4, 136), (4, 36), (3, 32)])
def test_heads_without_a_kernel_stay(heads: int, width: int) -> None:
    assert use_cache_attention(graph("decode", heads=heads, width=width)) == 0


@pytest.mark.parametrize(
    ("dtype", "cache", "expected"),
    [("float", False, 1), ("float16", True, 1), ("float16", False, 0)],
)
def test_what_a_parser_takes_of_its_own_stays(dtype: str, cache: bool, expected: int) -> None:
    model = graph("decode", dtype)
    assert use_cache_attention(model, ["float16"], cache=cache) == expected


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_a_prompt_over_itself(dtype: str) -> None:
    shape = f"{dtype}[B, 4, N, 64]"
    model = graph_of(
        "y = Attention <is_causal = 1, scale = 0.5> (q, k, v) z = Attention (y, k, v)",
        f"{shape} q, {shape} k, {shape} v",
        f"{shape} z",
    )
    assert use_cache_attention(model, ["float16"]) == int(dtype == "float")
    assert [n.op_type for n in model.graph][-1] == "Attention"  # sees everything, as towers do
    for node in found(model):
        counted = node.inputs[3].producer()
        assert counted is not None
        assert counted.op_type == "Expand"
        assert node.attributes.get_float("scale", 0) == 0.5
