"""fp16 and bf16 graphs that compute in fp32: what is cast, and where."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper

from lvlm.export.verify.waiting import beside, let_quantized_wait, waiting
from lvlm.export.verify.widened import widen

ROWS, WIDTH = 50, 8
FLOAT16 = onnx.TensorProto.FLOAT16


def embedding_and_head(folder: Path, head: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """ids -> Gather -> MatMul, the weights in a file, with ``head`` the name of the second."""
    random = np.random.default_rng(0)
    weights = {"table": random.standard_normal((ROWS, WIDTH)).astype(np.float16)}
    weights["head"] = random.standard_normal((ROWS, WIDTH)).astype(np.float16)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Transpose", [head], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["rows", "turned"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("logits", FLOAT16, ["n", ROWS])],
        [onnx.numpy_helper.from_array(weights[n], n) for n in dict.fromkeys(("table", head))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    return onnx.load(path, load_external_data=False), weights


@pytest.mark.parametrize("head", ["head", "table"], ids=["own", "shared with the embedding"])
def test_rows_that_are_looked_up_are_cast_and_not_the_table(head: str, tmp_path: Path) -> None:
    model, weights = embedding_and_head(tmp_path, head)
    wide = ir.to_proto(widen(ir.from_proto(model), "float16"))
    casts = Counter(n.input[0] for n in wide.graph.node if n.op_type == "Cast")
    assert casts == {"rows": 1, f"{head}_fp32_0_waits": 1}
    onnx.save(wide, tmp_path / "wide.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "wide.onnx")
    ids = np.array([3, 49, 0], np.int64)
    (found,) = session.run(None, {"ids": ids})
    expected = weights["table"][ids].astype(np.float32) @ weights[head].astype(np.float32).T
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_weight_is_cast_when_its_product_is_next(tmp_path: Path) -> None:
    """Casts that wait for nothing are all run first, and then a model is in memory twice."""
    model, _ = embedding_and_head(tmp_path, "head")
    wide = widen(ir.from_proto(model), "float16")
    (cast,) = (n for n in wide.graph if n.op_type == "Cast" and n.name.startswith("head"))
    found, ahead = set(), [cast]
    while ahead:
        for value in ahead.pop().inputs:
            assert value is not None
            producer = value.producer()
            found.add(value.name)
            ahead += [] if producer is None else [producer]
    assert {"head", "table", "ids"} <= found


def test_a_weight_that_a_number_is_added_to() -> None:
    """A number is there from the beginning: the weight waits for what it is multiplied with."""
    weight = np.arange(WIDTH, dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["one"], value_float=1.0),
            helper.make_node("Add", ["w", "one"], ["scale"]),
            helper.make_node("Mul", ["x", "scale"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", WIDTH])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opset = [helper.make_opsetid("", 24)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=10))
    add, value = model.graph[1], model.graph.initializers["w"]
    assert add.op_type == "Add"
    before, given = waiting(value, beside(add, value), "w")
    model.graph.insert_before(add, before)
    add.replace_input_with(0, given)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    x = np.ones((3, WIDTH), np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x * (1 + weight))


def test_a_convolution_without_a_bias(tmp_path: Path) -> None:
    """As torch writes CLIP's: a bias is made of the weight's shape and a zero that has no shape."""
    weight = np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype(np.float16)
    node = helper.make_node
    nodes = [
        node("Cast", ["pixels"], ["x"], to=FLOAT16),
        node("Shape", ["w"], ["count"], start=0, end=1),
        node("Constant", [], ["ones"], value_ints=[1]),
        node("Expand", ["count", "ones"], ["length"]),
        node("Constant", [], ["nought"], value_float=0.0),
        node("CastLike", ["nought", "x"], ["zero"]),
        node("Expand", ["zero", "length"], ["bias"]),
        node("Conv", ["x", "w", "bias"], ["y"], strides=[2, 2]),
    ]
    sizes = {"pixels": ["n", 3, 4, 4], "y": ["n", 4, 2, 2]}
    image, found = (
        helper.make_tensor_value_info(name, kind, sizes[name])
        for name, kind in (("pixels", onnx.TensorProto.FLOAT), ("y", FLOAT16))
    )
    graph = helper.make_graph(
        nodes, "g", [image], [found], [onnx.numpy_helper.from_array(weight, "w")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    wide = widen(ir.from_proto(onnx.load(path, load_external_data=False)), "float16")
    onnx.save(ir.to_proto(wide), tmp_path / "wide.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "wide.onnx")
    (features,) = session.run(None, {"pixels": np.ones((1, 3, 4, 4), np.float32)})
    sums = weight.astype(np.float32).sum((1, 2, 3))[:, None, None]
    np.testing.assert_allclose(features[0], sums * np.ones((1, 2, 2)), rtol=1e-5, atol=1e-5)


def test_a_quantized_weight_waits_as_well() -> None:
    random = np.random.default_rng(0)
    packed = random.integers(0, 255, (WIDTH, ROWS)).astype(np.uint8)
    scales = random.random((1, ROWS)).astype(np.float32)
    spread = {"axis": 0, "block_size": WIDTH}
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "s"], ["wide"], name="spread", **spread),
            helper.make_node("MatMul", ["x", "wide"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", ROWS])],
        [onnx.numpy_helper.from_array(packed, "w"), onnx.numpy_helper.from_array(scales, "s")],
    )
    opset = [helper.make_opsetid("", 24)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=10))
    let_quantized_wait(model)
    node = next(n for n in model.graph if n.op_type == "DequantizeLinear")
    assert node.inputs[1] is not None
    assert node.inputs[1].producer() is not None
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    x = random.standard_normal((3, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(
        session.run(None, {"x": x})[0], x @ (packed * scales), rtol=1e-4, atol=1e-3
    )
