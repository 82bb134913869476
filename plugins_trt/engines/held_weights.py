"""Bytes of weights that every engine holds for itself, known before anything is lowered: of
quantized weights they are not those of the bundle (export/targets/passes/signed_weights.py)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from lvlm.export.targets.description import SignedWeights
from lvlm.plugins_trt.engines.graph_protos import read_proto
from lvlm.runtime.bundle.engine_sets import EngineWeight

BITS: dict[int, int] = {TensorProto.UINT4: 4, TensorProto.UINT8: 8}
FLOATS: dict[int, type[np.generic]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
}
MIDDLE = {4: 0x88, 8: 0x80}  # a byte of zero points that are in the middle


def held_weights(
    path: Path,
    stored: Mapping[str, EngineWeight],
    shared: Collection[str],
    signed: SignedWeights | None,
) -> int:
    """Bytes of weights in the engine of the canonical graph in a file.

    Args:
        stored: its weights by name.
        shared: names of those that are inputs.
        signed: the quantized weights that the target takes; None: none.
    """
    held = {name: weight.bytes for name, weight in stored.items() if name not in shared}
    if signed is not None:
        graph = read_proto(path).graph
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "DequantizeLinear":
                held |= _lowered(path.parent, node, tensors, stored, signed)
    return sum(held.values())


def _lowered(
    folder: Path,
    node: onnx.NodeProto,
    tensors: Mapping[str, TensorProto],
    stored: Mapping[str, EngineWeight],
    signed: SignedWeights,
) -> dict[str, int]:
    """Bytes of the scales of a quantized weight, of its zero points, which become none, and of the
    constants that are left over, by name."""
    numbers, scales, points = (tensors[name] for name in node.input)
    bits, blocks = BITS[numbers.data_type], scales.dims[1]
    size = stored[scales.name].bytes
    if signed.whole(bits, numbers.dims[1] // blocks):
        size //= blocks
    over = (_read(folder, stored[points.name], np.uint8) != MIDDLE[bits]).any()
    if signed.positive(bits) and not over:
        over = (_read(folder, stored[scales.name], FLOATS[scales.data_type]) < 0).any()
    return {scales.name: size, points.name: 0, f"{numbers.name}.left_over": size if over else 0}


def _read(folder: Path, weight: EngineWeight, dtype: type[np.generic]) -> np.ndarray:
    count = weight.bytes // np.dtype(dtype).itemsize
    return np.fromfile(folder / weight.file, dtype, count, offset=weight.offset)
