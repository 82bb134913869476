"""A split by sequence and the same as one Split: equal parts, and what is left alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from lvlm.export.graphs.plain_splits import plain_splits


def model_of(
    shape: tuple[int | str, ...],
    split: int | list[int] | None,
    places: list[int],
    axis: int = 0,
    *,
    length: bool = False,
    bare: bool = False,
) -> onnx.ModelProto:
    """Parts of "x" at ``places`` of a SplitToSequence, negated unless ``bare``; ``length``: and how
    many there are."""
    nodes = [
        helper.make_node(
            "SplitToSequence", ["x", "split"] if split is not None else ["x"], ["parts"], axis=axis
        )
    ]
    weights = [numpy_helper.from_array(np.array(split or 1, np.int64), "split")]
    for name, place in enumerate(places):
        weights.append(numpy_helper.from_array(np.array(place, np.int64), f"at_{name}"))
        taken = f"part_{name}" if bare else f"taken_{name}"
        nodes.append(helper.make_node("SequenceAt", ["parts", f"at_{name}"], [taken]))
        if not bare:
            nodes.append(helper.make_node("Neg", [taken], [f"part_{name}"]))
    outputs = [
        helper.make_tensor_value_info(f"part_{name}", TensorProto.FLOAT, [None] * len(shape))
        for name in range(len(places))
    ]
    if length:
        nodes.append(helper.make_node("SequenceLength", ["parts"], ["length"]))
        outputs.append(helper.make_tensor_value_info("length", TensorProto.INT64, []))
    data = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "g", [data], outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def rewritten(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    read = ir.from_proto(model)
    done = plain_splits(read)
    after = ir.to_proto(read)
    onnx.checker.check_model(after, full_check=True)
    return after, done


def kinds(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


@given(
    data=st.data(),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    axis=st.sampled_from([0, 1, -1, -2]),
)
def test_parts_of_listed_lengths(data: st.DataObject, sizes: list[int], axis: int) -> None:
    count = len(sizes)
    places = data.draw(st.lists(st.integers(-count, count - 1), min_size=1, max_size=4))
    shape = (3, sum(sizes)) if axis % 2 else (sum(sizes), 3)
    check(model_of(shape, sizes, places, axis), shape)


@given(length=st.integers(1, 9), size=st.integers(1, 9), axis=st.sampled_from([0, 1, -1]))
def test_parts_of_one_length_and_what_remains(length: int, size: int, axis: int) -> None:
    shape = (2, length) if axis % 2 else (length, 2)
    check(model_of(shape, size, list(range(-(-length // size))), axis), shape)


def check(before: onnx.ModelProto, shape: tuple[int, ...]) -> None:
    after, done = rewritten(before)
    assert done == 1
    assert kinds(after) == {"Constant", "Split", "Neg"}
    feed = {"x": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}
    found, wanted = (ReferenceEvaluator(m).run(None, feed) for m in (after, before))
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(model_of((4, 2), [1, 3], [0], length=True), id="another reads the sequence"),
        pytest.param(model_of((4, 2), [1, 3], [0], bare=True), id="a part is an output"),
        pytest.param(model_of(("n", 2), 2, [0]), id="the number of parts is not known"),
        pytest.param(model_of((4, 2), None, [0]), id="every part loses its axis or keeps one"),
    ],
)
def test_left_alone(model: onnx.ModelProto) -> None:
    after, done = rewritten(model)
    assert done == 0
    assert "SplitToSequence" in kinds(after)


def test_a_dynamic_axis_may_be_split_by_listed_lengths() -> None:
    check(model_of(("n", 2), [1, 3], [1, 0]), (4, 2))
