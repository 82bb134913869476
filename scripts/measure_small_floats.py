"""Weights in FP8 and NVFP4 that TensorRT-RTX's builder takes, by architecture.

    python scripts/measure_small_floats.py

One MatMul in fp16 over DequantizeLinear of a constant; FP8 (E4M3) with a scale for each output, and
with a fixed scale of what comes in, too; NVFP4 (E2M1) in blocks of 16 inputs, whose scales are FP8
with a factor in common (OCP MX formats and NVIDIA's NVFP4 have such blocks). Built ahead of time,
without a GPU. docs/notes/tensorrt.md has the table.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lvlm.core.errors import LvlmError
from lvlm.plugins_trt.engines.tensorrt_builder import BuildSettings, open_tensorrt

INPUTS, OUTPUTS, ROWS = 1024, 2048, 4
BLOCK = 16
LARGEST_FP8, LARGEST_FP4 = 448, 6
ARCHITECTURES = (86, 89, 120)
Parts = tuple[list[onnx.NodeProto], list[onnx.TensorProto]]


def main() -> None:
    weight = np.random.default_rng(0).normal(size=(INPUTS, OUTPUTS)).astype(np.float32)
    kinds = {
        "FP8, a scale for each output": fp8(weight),
        "FP8, inputs in FP8, too": fp8_inputs(weight),
        "NVFP4": nvfp4(weight),
    }
    print("| weight | architecture | engine, bytes | computes in, bytes |")
    print("| --- | --- | --: | --: |")
    for kind, parts in kinds.items():
        for sm in ARCHITECTURES:
            settings = BuildSettings({"x": ((1, INPUTS), (1, INPUTS), (ROWS, INPUTS))}, sms=(sm,))
            try:
                built = open_tensorrt("tensorrt-rtx").build(model(*parts), settings)
            except LvlmError as error:
                print(f"| {kind} | sm_{sm} | {str(error).partition('because ')[2][:60]} | |")
            else:
                sizes = f"{built.engine.nbytes:,} | {built.activations:,}"
                print(f"| {kind} | sm_{sm} | {sizes} |", flush=True)


def fp8(weight: np.ndarray) -> Parts:
    scales = (np.abs(weight).max(0) / LARGEST_FP8).astype(np.float16)
    numbers = (weight / scales).astype(ml_dtypes.float8_e4m3fn)
    dequantize = helper.make_node("DequantizeLinear", ["numbers", "scales"], ["weight"], axis=1)
    constants = [
        raw("numbers", TensorProto.FLOAT8E4M3FN, numbers),
        numpy_helper.from_array(scales, "scales"),
    ]
    return [dequantize, helper.make_node("MatMul", ["x", "weight"], ["y"])], constants


def fp8_inputs(weight: np.ndarray) -> Parts:
    """Scales that the GPU's FP8 products have: one of each side."""
    scale = np.float16(np.abs(weight).max() / LARGEST_FP8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["held"]),
        helper.make_node("DequantizeLinear", ["held", "step"], ["spread"]),
        helper.make_node("DequantizeLinear", ["numbers", "scale"], ["weight"]),
        helper.make_node("MatMul", ["spread", "weight"], ["y"]),
    ]
    numbers = (weight / np.float32(scale)).astype(ml_dtypes.float8_e4m3fn)
    return nodes, [
        raw("numbers", TensorProto.FLOAT8E4M3FN, numbers),
        raw("zero", TensorProto.FLOAT8E4M3FN, np.zeros((), ml_dtypes.float8_e4m3fn)),
        numpy_helper.from_array(np.array(scale), "scale"),
        numpy_helper.from_array(np.array(0.02, np.float16), "step"),
    ]


def nvfp4(weight: np.ndarray) -> Parts:
    largest = np.abs(weight.reshape(-1, BLOCK, OUTPUTS)).max(1)
    factor = np.float16(largest.max() / LARGEST_FP4 / LARGEST_FP8)
    scales = (largest / LARGEST_FP4 / np.float32(factor)).astype(ml_dtypes.float8_e4m3fn)
    steps = scales.astype(np.float32).repeat(BLOCK, 0) * np.float32(factor)
    numbers = (weight / steps).astype(ml_dtypes.float4_e2m1fn).view(np.uint8).ravel()
    pairs = numbers[0::2] | (numbers[1::2] << 4)
    nodes = [
        helper.make_node("DequantizeLinear", ["scales", "factor"], ["steps"]),
        helper.make_node(
            "DequantizeLinear", ["numbers", "steps"], ["weight"], axis=0, block_size=BLOCK
        ),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
    ]
    return nodes, [
        helper.make_tensor(
            "numbers", TensorProto.FLOAT4E2M1, weight.shape, pairs.tobytes(), raw=True
        ),
        raw("scales", TensorProto.FLOAT8E4M3FN, scales),
        numpy_helper.from_array(np.array(factor), "factor"),
    ]


def raw(name: str, kind: int, array: np.ndarray) -> onnx.TensorProto:
    return helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True)


def model(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> bytes:
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["b", width])
        for name, width in (("x", INPUTS), ("y", OUTPUTS))
    ]
    graph = helper.make_graph(nodes, "linear", ports[:1], ports[1:], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    serialized: bytes = made.SerializeToString()
    return serialized


if __name__ == "__main__":
    main()
