"""Products with quantized weights: DequantizeLinear, Transpose and MatMul in a MatMul's place, or
DequantizeLinear and Gemm in a Gemm's.

Standard ops on purpose: every reader of ONNX runs them. Targets exchange them for a product of
their own that reads the quantized weight directly.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from lvlm.core.errors import ExportError
from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.weights.quantization import WeightQuantization

BLOCKS = ".blocks"  # appended to a name: the same bytes as MatMulNBits reads them
NUMBERS = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
Role = Literal["numbers", "scales", "zero points"]


@dataclass(frozen=True)
class QuantizedTensor:
    """An initializer that is computed from the weight ``source``, which is [K,N] or, where
    ``outputs_first``, [N,K]."""

    source: str
    outputs_first: bool
    role: Role
    how: WeightQuantization


def quantize_linears(
    graphs: Sequence[TracedGraph],
    wanted: Collection[str],
    fused: Mapping[str, tuple[str, ...]],
    how: WeightQuantization,
) -> dict[str, QuantizedTensor]:
    """Quantize the products with the parameters ``wanted``, of which ``fused`` has those that lie
    side by side in one tensor; the new initializers by name.

    ExportError if one of them is not multiplied with as expected.
    """
    made: dict[str, QuantizedTensor] = {}
    for graph in graphs:
        done: dict[tuple[str, str], ir.Value] = {}  # weight and kind of product -> its input
        for node in list(graph.model.graph):
            found = _weight(graph, node)
            if found is None or not set(fused.get(found[0], (found[0],))) <= set(wanted):
                continue
            name, outputs_first = found
            key = (name, node.op_type)
            if key not in done:
                done[key] = _dequantized(graph, node, name, outputs_first, how, made)
            node.replace_input_with(1, done[key])
        _drop_unused(graph)
    sources = {t.source for t in made.values()}
    quantized = {part for source in sources for part in fused.get(source, (source,))}
    if left := sorted(set(wanted) - quantized):
        raise ExportError(f"{left[0]} is no plain matrix product; leave --weights out")
    return made


def _weight(graph: TracedGraph, node: ir.Node) -> tuple[str, bool] | None:
    """The parameter that a product multiplies with, and whether it lies [N,K]: as Gemm reads it
    here, or before a Transpose."""
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return None
    value, outputs_first = node.inputs[1], node.op_type == "Gemm"
    if outputs_first and not is_plain_gemm(node):
        return None
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Transpose" and not outputs_first:
        value, outputs_first = producer.inputs[0], True
    if value is None or value.name is None or graph.parameters.get(value.name) is not value:
        return None
    return (value.name, outputs_first) if len(value.shape or ()) == 2 else None


def is_plain_gemm(node: ir.Node) -> bool:
    """Whether a Gemm multiplies with the transpose of what it is given, and does nothing else but
    add a bias."""
    given = node.attributes
    scaled = given.get_float("alpha", 1.0) != 1 or given.get_float("beta", 1.0) != 1
    return not scaled and given.get_int("transB", 0) == 1 and given.get_int("transA", 0) == 0


def _dequantized(
    graph: TracedGraph,
    node: ir.Node,
    name: str,
    outputs_first: bool,
    how: WeightQuantization,
    made: dict[str, QuantizedTensor],
) -> ir.Value:
    """The weight as ``node`` wants it, computed before it from its quantized form."""
    weight = graph.parameters[name]
    assert weight.shape is not None
    first, second = weight.shape.numpy()
    outputs, inputs = (first, second) if outputs_first else (second, first)
    how.check(name, inputs)
    scales = [outputs, inputs // how.block]
    kinds: dict[Role, tuple[str, ir.DataType, list[int]]] = {
        "numbers": (f"{name}.int{how.bits}", NUMBERS[how.bits], [outputs, inputs]),
        "scales": (f"{name}.scale", weight.dtype or ir.DataType.FLOAT, scales),
        # The same for all weights of one shape, which therefore share it
        "zero points": (f"zero_points.{scales[0]}x{scales[1]}", NUMBERS[how.bits], scales),
    }
    values = []
    for role, (new, dtype, shape) in kinds.items():
        made[new] = QuantizedTensor(name, outputs_first, role, how)
        if new not in graph.parameters:
            value = ir.Value(name=new, type=ir.TensorType(dtype), shape=ir.Shape(shape))
            value.const_value = weight.const_value  # until weights.attach
            graph.model.graph.initializers[new] = value
            graph.parameters[new] = value
        values.append(graph.parameters[new])
    steps = [ir.node("DequantizeLinear", values, attributes={"axis": 1, "block_size": how.block})]
    _describe(steps[0], f"{name}.dequantized", weight, [outputs, inputs])
    if node.op_type == "MatMul":
        steps.append(ir.node("Transpose", [steps[0].outputs[0]], attributes={"perm": [1, 0]}))
        _describe(steps[1], f"{name}.transposed", weight, [inputs, outputs])
    graph.model.graph.insert_before(node, steps)
    return steps[-1].outputs[0]


def _describe(node: ir.Node, name: str, like: ir.Value, shape: list[int]) -> None:
    output = node.outputs[0]
    output.name, output.type, output.shape = name, like.type, ir.Shape(shape)


def _drop_unused(graph: TracedGraph) -> None:
    """Transposes of weights that nothing reads any more, then parameters likewise."""
    for name, value in list(graph.parameters.items()):
        for node, _ in list(value.uses()):
            if node.op_type == "Transpose" and not list(node.outputs[0].uses()):
                graph.model.graph.remove(node, safe=True)
        if not list(value.uses()):
            del graph.parameters[name]
            del graph.model.graph.initializers[name]
