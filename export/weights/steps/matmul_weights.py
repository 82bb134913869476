"""MatMuls with a stored weight, found and given a quantized one instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.weights.expressions import Expression, Transpose, sources
from lvlm.export.weights.quantization import BLOCKS_SUFFIX, ZERO_POINTS_SUFFIX
from lvlm.export.weights.quantized_weights import Numbers, QuantizedWeight, Scales
from lvlm.export.weights.store import View, WeightStore


def exchange_weights(
    graphs: Sequence[TracedGraph],
    store: WeightStore,
    choose: Callable[[str, Expression], QuantizedWeight | None],
) -> set[str]:
    """Give MatMuls a quantized weight instead of their own.

    Args:
        choose: of a weight's name and its expression [K,N] what to take for it; None: it stays.

    Returns:
        The checkpoint's tensors that are quantized now.
    """
    quantized: set[str] = set()
    for graph in graphs:
        done: dict[tuple[str, str], ir.Value] = {}  # weight and kind of op -> its input
        for node in list(graph.model.graph):
            if (found := weight_of(graph, node)) is None:
                continue
            name, outputs_first = found
            chosen = choose(name, Transpose(store[name]) if outputs_first else store[name])
            if chosen is None:
                continue
            key = (name, node.op_type)
            if key not in done:
                done[key] = spread_before(graph, node, name, chosen, store)
            node.replace_input_with(1, done[key])
            quantized |= sources(store[name])
        drop_unused(graph, store)
    return quantized


def weight_of(graph: TracedGraph, node: ir.Node) -> tuple[str, bool] | None:
    """The parameter that a MatMul multiplies with, and whether it lies [N,K]: as Gemm reads it
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
    """True where a Gemm multiplies with the transpose of what it is given, and does nothing else
    but add a bias."""
    given = node.attributes
    scaled = given.get_float("alpha", 1.0) != 1 or given.get_float("beta", 1.0) != 1
    return not scaled and given.get_int("transB", 0) == 1 and given.get_int("transA", 0) == 0


def spread_before(
    graph: TracedGraph, node: ir.Node, name: str, quantized: QuantizedWeight, store: WeightStore
) -> ir.Value:
    """The weight ``name`` as ``node`` wants it, computed before it from its ``quantized`` form."""
    how, (inputs, outputs), dtype = quantized.how, quantized.of.shape, quantized.of.dtype
    blocks = inputs // how.block
    made: dict[str, Expression] = {
        (numbers := f"{name}.int{how.bits}"): Numbers(quantized),
        f"{name}.scale": Scales(quantized),
    }
    zero_points = quantized.zero_points()
    # Where they are alike, the same for all weights of one shape, which therefore share them
    own = name + ZERO_POINTS_SUFFIX
    own = own if zero_points.operands else f"zero_points.{outputs}x{blocks}"
    made[own] = zero_points
    values = [store.add(graph, new, expression) for new, expression in made.items()]
    packed = View(numbers + BLOCKS_SUFFIX, how.blocks(outputs, inputs), ir.DataType.UINT8)
    store.views[numbers] = (packed,)
    if zero_points.operands:
        packed_zeros = (outputs, blocks * how.bits // 8)
        store.views[own] = (View(own + BLOCKS_SUFFIX, packed_zeros, ir.DataType.UINT8),)
    steps = [ir.node("DequantizeLinear", values, attributes={"axis": 1, "block_size": how.block})]
    _describe(steps[0], f"{name}.dequantized", dtype, [outputs, inputs])
    if node.op_type == "MatMul":
        steps.append(ir.node("Transpose", [steps[0].outputs[0]], attributes={"perm": [1, 0]}))
        _describe(steps[1], f"{name}.transposed", dtype, [inputs, outputs])
    graph.model.graph.insert_before(node, steps)
    return steps[-1].outputs[0]


def _describe(node: ir.Node, name: str, dtype: ir.DataType, shape: list[int]) -> None:
    output = node.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(dtype), ir.Shape(shape)


def drop_unused(graph: TracedGraph, store: WeightStore) -> None:
    """Transposes of weights that nothing reads any more, then weights likewise."""
    for name, value in list(graph.parameters.items()):
        for node, _ in list(value.uses()):
            if node.op_type == "Transpose" and not list(node.outputs[0].uses()):
                graph.model.graph.remove(node, safe=True)
        if not list(value.uses()):
            store.drop(graph, name)
