"""MatMuls with quantized weights: DequantizeLinear, Transpose and MatMul in a MatMul's place, or
DequantizeLinear and Gemm in a Gemm's.

Standard ops on purpose: every reader of ONNX runs them. Targets exchange them for a product of
their own that reads the quantized weight directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lvlm.core.errors import ExportError
from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.weights.expressions import Expression, Transpose, sources
from lvlm.export.weights.quantization import BLOCKS_SUFFIX, WeightQuantization
from lvlm.export.weights.quantized_weights import Numbers, QuantizedWeight, Scales, zero_points
from lvlm.export.weights.store import View, WeightStore


@dataclass(frozen=True)
class QuantizeLinears:
    """Quantize the MatMuls with the checkpoint's tensors ``wanted``, several of which may lie side
    by side in one weight.

    ``apply`` raises ExportError if one of them is not multiplied with as expected.
    """

    how: WeightQuantization
    wanted: frozenset[str]

    def apply(self, graphs: Sequence[TracedGraph], store: WeightStore) -> None:
        quantized: set[str] = set()
        for graph in graphs:
            done: dict[tuple[str, str], ir.Value] = {}  # weight and kind of product -> its input
            for node in list(graph.model.graph):
                found = _weight(graph, node)
                if found is None or not sources(store[found[0]]) <= self.wanted:
                    continue
                key = (found[0], node.op_type)
                if key not in done:
                    done[key] = _dequantized(graph, node, *found, self.how, store)
                node.replace_input_with(1, done[key])
                quantized |= sources(store[found[0]])
            _drop_unused(graph, store)
        if left := sorted(self.wanted - quantized):
            raise ExportError(f"{left[0]} is no plain matrix product; leave --weights out")


def _weight(graph: TracedGraph, node: ir.Node) -> tuple[str, bool] | None:
    """The parameter that a product multiplies with, and whether it lies [N,K]: as Gemm reads it
    here, or before a Transpose."""
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return None
    value, outputs_first = node.inputs[1], node.op_type == "Gemm"
    if outputs_first and not _is_plain_gemm(node):
        return None
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Transpose" and not outputs_first:
        value, outputs_first = producer.inputs[0], True
    if value is None or value.name is None or graph.parameters.get(value.name) is not value:
        return None
    return (value.name, outputs_first) if len(value.shape or ()) == 2 else None


def _is_plain_gemm(node: ir.Node) -> bool:
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
    store: WeightStore,
) -> ir.Value:
    """The weight as ``node`` wants it, computed before it from its quantized form."""
    weight = Transpose(store[name]) if outputs_first else store[name]
    inputs, outputs = weight.shape
    how.check(name, inputs)
    quantized = QuantizedWeight(weight, how)
    blocks = "x".join(map(str, quantized.scales_shape))
    made: dict[str, Expression] = {
        (numbers := f"{name}.int{how.bits}"): Numbers(quantized),
        f"{name}.scale": Scales(quantized),
        # The same for all weights of one shape, which therefore share it
        f"zero_points.{blocks}": zero_points(quantized),
    }
    values = [store.add(graph, new, expression) for new, expression in made.items()]
    packed = View(numbers + BLOCKS_SUFFIX, how.blocks(outputs, inputs), ir.DataType.UINT8)
    store.views[numbers] = (packed,)
    steps = [ir.node("DequantizeLinear", values, attributes={"axis": 1, "block_size": how.block})]
    _describe(steps[0], f"{name}.dequantized", weight.dtype, [outputs, inputs])
    if node.op_type == "MatMul":
        steps.append(ir.node("Transpose", [steps[0].outputs[0]], attributes={"perm": [1, 0]}))
        _describe(steps[1], f"{name}.transposed", weight.dtype, [inputs, outputs])
    graph.model.graph.insert_before(node, steps)
    return steps[-1].outputs[0]


def _describe(node: ir.Node, name: str, dtype: ir.DataType, shape: list[int]) -> None:
    output = node.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(dtype), ir.Shape(shape)


def _drop_unused(graph: TracedGraph, store: WeightStore) -> None:
    """Transposes of weights that nothing reads any more, then weights likewise."""
    for name, value in list(graph.parameters.items()):
        for node, _ in list(value.uses()):
            if node.op_type == "Transpose" and not list(node.outputs[0].uses()):
                graph.model.graph.remove(node, safe=True)
        if not list(value.uses()):
            store.drop(graph, name)
