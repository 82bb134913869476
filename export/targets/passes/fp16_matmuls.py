"""MatMuls in fp16 for GPUs that have no others, wherever a graph multiplies in fp32."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

TINY = 1e-30  # what a row of zeros is divided by


def fp16_matmuls(model: ir.Model) -> int:
    """Multiply fp16 operands instead of fp32 ones, in functions and loops too; how many MatMuls.

    Every row of the first and every column of the second operand is divided by its largest number
    and the result multiplied by both: no sum of up to 65,504 terms overflows. What is not finite
    stays so, in its own row or column. Precondition: operands have two and more dimensions.
    """
    replaced = 0
    scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for scope in scopes:
        for node in list(ir.traversal.RecursiveGraphIterator(scope)):
            if node.domain == "" and node.op_type == "MatMul" and not _is_fp16(node):
                _multiply_in_fp16(node)
                replaced += 1
    return replaced


def _is_fp16(node: ir.Node) -> bool:
    """Functions do not know their types: a MatMul in there is taken for one in fp32, and one that
    is not, for which this is idle work, stays what it is."""
    return any(v is not None and v.dtype == ir.DataType.FLOAT16 for v in node.inputs)


def _multiply_in_fp16(node: ir.Node) -> None:
    first, second = node.inputs
    result = node.outputs[0]
    made: list[ir.Node] = []

    def emit(op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        new = ir.node(op, list(inputs), attributes=attributes)
        new.outputs[0].name = f"{result.name}_fp16_{len(made)}"
        made.append(new)
        return new.outputs[0]

    def largest(value: ir.Value | None, axis: int) -> ir.Value:
        peak = emit("ReduceMax", emit("Abs", value), emit("Constant", value_ints=[axis]))
        return emit("Max", peak, emit("CastLike", emit("Constant", value_float=TINY), value))

    rows, columns = largest(first, -1), largest(second, -2)
    scaled = [emit("Div", first, rows), emit("Div", second, columns)]
    halves = [emit("Cast", value, to=int(ir.DataType.FLOAT16)) for value in scaled]
    mixed = emit("CastLike", emit("MatMul", *halves), first)
    restored = emit("Mul", emit("Mul", mixed, rows), columns)
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, made)
    result.replace_all_uses_with(restored, replace_graph_outputs=True)
    restored.name, result.name = result.name, f"{result.name}_replaced"
    restored.shape, restored.type = result.shape, result.type
    graph.remove(node, safe=True)
