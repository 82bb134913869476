"""A graph in fp16 or bf16 that computes in fp32 over the same stored weights: each is cast where it
is read."""

from __future__ import annotations

import onnx_ir as ir

from lvlm.export.verify.waiting import beside, waiting

FP32 = ir.DataType.FLOAT
# Dtype of a manifest -> of its graphs' values
LOW_PRECISION = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
TYPES = ("to", "dtype", "softmax_precision", "stash_type")  # attributes that name a data type


def widen(model: ir.Model, dtype: str) -> ir.Model:
    """Change ``model``: every value of ``dtype`` is of fp32, weights in files excepted."""
    graph, low = model.graph, LOW_PRECISION[dtype]
    casts: list[ir.Value] = []
    for value in list(graph.initializers.values()):
        if value.const_value is None or value.const_value.dtype != low:
            continue
        if isinstance(value.const_value, ir.ExternalTensor):
            casts.append(value)
        else:
            value.const_value = _as_fp32(value.const_value)
            value.dtype = FP32
    scopes: list[ir.Graph | ir.Function] = [graph, *model.functions.values()]
    for scope in scopes:
        _widen_values(scope, low)
        for node in scope.all_nodes():
            _widen_node(node, low)
    for value in casts:
        value.dtype = low
        _cast_where_read(graph, value, low)
    return model


def _cast_where_read(graph: ir.Graph, weight: ir.Value, low: ir.DataType) -> None:
    """Cast the weight where it is read: of a table of embeddings the few rows that are looked
    up."""
    uses = list(weight.uses())
    found = [u.node for u in uses if u.node.op_type == "Gather" and u.idx == 0]
    for node in found:
        rows = node.outputs[0]
        takers = list(rows.uses())
        rows.dtype = low
        cast = _cast(rows, f"{rows.name}_fp32")
        graph.insert_after(node, cast)
        for use in takers:
            use.node.replace_input_with(use.idx, cast.outputs[0])
    for number, use in enumerate(u for u in uses if u.node not in found):
        # One for each use: as many weights in fp32 at a time as one MatMul takes
        name = f"{weight.name}_fp32_{number}"
        before, source = waiting(weight, beside(use.node, weight), name)
        cast = _cast(source, name)
        graph.insert_before(use.node, [*before, cast])
        use.node.replace_input_with(use.idx, cast.outputs[0])


def _cast(value: ir.Value, name: str) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": ir.AttrInt64("to", int(FP32))}, name=name)
    out = cast.outputs[0]
    out.name, out.dtype, out.shape = name, FP32, value.shape
    return cast


def _widen_values(scope: ir.Graph | ir.Function, low: ir.DataType) -> None:
    for value in (*scope.inputs, *scope.outputs):
        if value.dtype == low:
            value.dtype = FP32


def _widen_node(node: ir.Node, low: ir.DataType) -> None:
    for value in node.outputs:
        if value.dtype == low:
            value.dtype = FP32
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.INT and name in TYPES and attribute.value == low:
            node.attributes[name] = ir.AttrInt64(name, int(FP32))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == low:
            node.attributes[name] = ir.AttrTensor(name, _as_fp32(attribute.value))
        elif attribute.type == ir.AttributeType.GRAPH:
            _widen_values(attribute.value, low)


def _as_fp32(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype("float32"), dtype=FP32, name=tensor.name)
