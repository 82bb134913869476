"""Quantized weights that TensorRT-RTX's builder takes, and what an engine of one MatMul holds.

    python scripts/measure_quantized_linears.py

Built ahead of time, without a GPU. docs/notes/tensorrt.md has the table.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lvlm.core.errors import LvlmError
from lvlm.plugins_trt.engines.tensorrt_builder import BuildSettings, open_tensorrt

INPUTS, OUTPUTS, ROWS = 1024, 2048, 4
KINDS = {4: TensorProto.INT4, 8: TensorProto.INT8}
ARCHITECTURES = (86, 89, 120)
CASES = [  # bits, inputs of a block (None: one scale a column), zero points, stored [N,K]
    *((4, block, False, False) for block in (16, 32, 64, 128)),
    *((4, block, False, True) for block in (32, 128)),
    *((8, block, False, False) for block in (None, 32, 128)),
    *((4, 32, True, False), (8, None, True, False), (8, None, False, True)),
]


def main() -> None:
    print("| bits | block | zero points | stored | engine, bytes | computes in, bytes |")
    print("| --- | --- | --- | --- | --: | --: |")
    for bits, block, zeros, turned in CASES:
        facts = f"| {bits} | {block or 'column'} | {zeros} | {'[N,K]' if turned else '[K,N]'} |"
        for sm in ARCHITECTURES:
            settings = BuildSettings({"x": ((1, INPUTS), (1, INPUTS), (ROWS, INPUTS))}, sms=(sm,))
            try:
                built = open_tensorrt("tensorrt-rtx").build(
                    linear(bits, block, zeros=zeros, turned=turned), settings
                )
            except LvlmError as error:
                print(f"{facts} sm_{sm}: {error} | |", flush=True)
                break
        else:
            print(f"{facts} {built.engine.nbytes:,} | {built.activations:,} |", flush=True)


def linear(bits: int, block: int | None, *, zeros: bool, turned: bool) -> bytes:
    """A model: x [b,K] in fp16 times a weight that DequantizeLinear makes of a constant."""
    draws = np.random.default_rng(0)
    shape = (OUTPUTS, INPUTS) if turned else (INPUTS, OUTPUTS)
    # Blocks lie along the inputs; a scale of its own has every output
    axis = int(turned) if block else int(not turned)
    scales = [n // block if i == axis else n for i, n in enumerate(shape)] if block else [OUTPUTS]
    numbers = draws.integers(-7, 8, shape).ravel().tolist()
    constants = [
        helper.make_tensor("numbers", KINDS[bits], shape, numbers),
        numpy_helper.from_array(draws.random(scales).astype(np.float16), "scales"),
    ]
    if zeros:
        points = [0] * int(np.prod(scales))
        constants.append(helper.make_tensor("zeros", KINDS[bits], scales, points))
    attributes: dict[str, Any] = {"axis": axis} | ({"block_size": block} if block else {})
    names = [tensor.name for tensor in constants]
    nodes = [helper.make_node("DequantizeLinear", names, ["weight"], **attributes)]
    if turned:
        nodes.append(helper.make_node("Transpose", ["weight"], ["columns"], perm=[1, 0]))
    nodes.append(helper.make_node("MatMul", ["x", nodes[-1].output[0]], ["y"]))
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["b", width])
        for name, width in (("x", INPUTS), ("y", OUTPUTS))
    ]
    graph = helper.make_graph(nodes, "linear", ports[:1], ports[1:], constants)
    opset = [helper.make_opsetid("", 21)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opset, ir_version=10)
    serialized: bytes = model.SerializeToString()
    return serialized


if __name__ == "__main__":
    main()
