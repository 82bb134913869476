"""Decode's own greedy choice: numpy's, to the tie; nothing where logits are not finite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from lvlm.plugins_trt.engines.greedy_choice import add_best
from lvlm.plugins_trt.engines.tensorrt_builder import BuildSettings, open_tensorrt
from lvlm.runtime.backends import BEST

WIDTH, WIDE = 64, 32


def head(vocab: int) -> onnx.ModelProto:
    """Logits as decode gives them: a product in fp16, as fp32."""
    weight = helper.make_tensor(
        "w", TensorProto.FLOAT16, (WIDTH, vocab), bytes(2 * WIDTH * vocab), raw=True
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Cast", ["y"], ["logits"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "decode",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", WIDTH])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", vocab])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def best(logits: np.ndarray) -> np.ndarray:
    """As ONNX Runtime computes it of ``logits``."""
    model = head(logits.shape[1])
    del model.graph.node[:], model.graph.initializer[:], model.graph.input[:]
    add_best(model)
    model.graph.input.append(model.graph.output[0])
    del model.graph.output[0]
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found: np.ndarray = session.run([BEST], {"logits": logits})[0]
    assert found.dtype == np.int64
    return found


@pytest.mark.parametrize("kinds", [2, 3, 1000])
def test_it_is_the_lowest_index_of_the_largest(kinds: int) -> None:
    """Few kinds of numbers: the largest is there more than once."""
    random = np.random.default_rng(kinds)
    logits = random.integers(-kinds, kinds, (50, 101)).astype(np.float32)
    logits[0], logits[1] = 0, -np.finfo(np.float32).max
    np.testing.assert_array_equal(best(logits), logits.argmax(1))


def test_of_logits_that_are_not_finite_there_is_none() -> None:
    logits = np.zeros((7, 50), np.float32)
    for row, (place, number) in enumerate(
        ((0, np.nan), (49, np.nan), (3, np.inf), (3, -np.inf), (7, np.finfo(np.float32).max)), 1
    ):
        logits[row, place] = number
    logits[6] = np.nan
    assert best(logits).tolist() == [0, -1, -1, -1, -1, 7, -1]


def test_the_builder_takes_it_and_computes_in_less_than_the_logits(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    vocab, rows = 40_000, 16
    onnx.save(head(vocab), tmp_path / "decode.onnx")
    shapes = {"x": ((1, WIDTH), (rows, WIDTH), (rows, WIDTH))}
    settings = BuildSettings(shapes, greedy=True, sms=(86,))
    built = open_tensorrt("tensorrt-rtx").build(tmp_path / "decode.onnx", settings)
    assert built.activations is not None
    assert built.activations < 2 * 4 * vocab * rows + 9_000_000  # any product takes 8 MB
