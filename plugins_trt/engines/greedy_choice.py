"""The greedy choice in the engine of decode, so that logits [B,vocabulary] stay on the device where
nothing else is asked of them: one number for each row goes to the host."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lvlm.runtime.backends import BEST

LOGITS = "logits"


def add_best(model: onnx.ModelProto) -> None:
    """Give a decode graph the output BEST, in place.

    Not by ArgMax, whose order of ties TensorRT does not promise: the largest logit first, then the
    lowest index that has it, as numpy's argmax. An index is exact in float32, up to 2 ** 24.
    """
    graph = model.graph
    (logits,) = (output for output in graph.output if output.name == LOGITS)
    rows, width = logits.type.tensor_type.shape.dim
    constants = {
        "indices": np.arange(width.dim_value, dtype=np.float32),
        "beyond": np.array(width.dim_value, np.float32),
        "infinity": np.array(np.inf, np.float32),
        "none": np.array(-1, np.float32),
        "axis": np.array([1], np.int64),
    }
    for name, array in constants.items():
        graph.initializer.append(numpy_helper.from_array(array, f"{BEST}.{name}"))
    # Below infinity is neither infinity nor NaN
    for kind, given, made, attributes in (
        ("ReduceMax", ("logits", "axis"), "largest", {"keepdims": 1}),
        ("Equal", ("logits", "largest"), "is_largest", {}),
        ("Where", ("is_largest", "indices", "beyond"), "index", {}),
        ("Abs", ("logits",), "size", {}),
        ("Less", ("size", "infinity"), "finite", {}),
        ("Where", ("finite", "index", "none"), "checked", {}),
        ("ReduceMin", ("checked", "axis"), "lowest", {"keepdims": 0}),
        ("Cast", ("lowest",), "", {"to": TensorProto.INT64}),
    ):
        inputs = [name if name == LOGITS else f"{BEST}.{name}" for name in given]
        output = f"{BEST}.{made}" if made else BEST
        graph.node.append(helper.make_node(kind, inputs, [output], **attributes))
    extent = rows.dim_param or rows.dim_value
    graph.output.append(helper.make_tensor_value_info(BEST, TensorProto.INT64, [extent]))
