"""Weights that wait for what they are multiplied with, so that one at a time is spread in memory.

ONNX Runtime runs what waits for nothing first: all casts of weights, all DequantizeLinear, and then
the whole model is in memory in the dtype that is computed in.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def let_quantized_wait(model: ir.Model) -> None:
    """Every DequantizeLinear of a weight runs when its MatMul is next: its scales wait."""
    graph = model.graph
    for node in list(graph):
        scales = node.inputs[1] if node.op_type == "DequantizeLinear" else None
        if scales is None or not scales.is_initializer():
            continue
        before, given = waiting(scales, beside(node, scales), f"{scales.name}_{node.name}")
        graph.insert_before(node, before)
        node.replace_input_with(1, given)


def beside(node: ir.Node, weight: ir.Value) -> ir.Value | None:
    """The value computed before ``node`` can take the weight, if any."""
    for value in node.inputs:
        if value is not None and value is not weight and not _constant(value):
            return value
    uses = list(node.outputs[0].uses())  # a weight that is transposed, or added to, on its way
    return beside(uses[0].node, node.outputs[0]) if len(uses) == 1 else None


def _constant(value: ir.Value) -> bool:
    """True where it is there from the beginning."""
    made = value.producer()
    return value.is_initializer() or (made is not None and made.op_type == "Constant")


def waiting(weight: ir.Value, value: ir.Value | None, name: str) -> tuple[list[ir.Node], ir.Value]:
    """Nodes that give the weight once ``value`` is there: its own shape, plus 0 of the other."""
    if value is None or weight.shape is None:
        return [], weight
    shape = ir.node("Shape", [value], name=f"{name}_of")
    one = ir.node("ReduceSum", [shape.outputs[0]], name=f"{name}_sum")  # of a scalar's shape, too
    zero, own = (
        ir.node("Constant", [], {"value": ir.AttrTensor("value", ir.tensor(x))}, name=f"{name}_{i}")
        for i, x in enumerate((np.zeros(1, np.int64), np.array(weight.shape.numpy(), np.int64)))
    )
    nothing = ir.node("Mul", [one.outputs[0], zero.outputs[0]], name=f"{name}_nothing")
    same = ir.node("Add", [own.outputs[0], nothing.outputs[0]], name=f"{name}_shape")
    given = ir.node("Reshape", [weight, same.outputs[0]], name=f"{name}_waits")
    nodes = [shape, one, zero, own, nothing, same, given]
    for node in nodes:
        node.outputs[0].name = node.name
    given.outputs[0].shape = weight.shape
    if weight.dtype is not None:
        given.outputs[0].dtype = weight.dtype
    return nodes, given.outputs[0]
