"""A graph in bf16 that computes in fp32 over the same stored weights: each is cast where it is
read."""

from __future__ import annotations

import onnx_ir as ir

NARROW, WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT
TYPES = ("to", "dtype", "softmax_precision", "stash_type")  # attributes that name a data type


def widen(model: ir.Model) -> ir.Model:
    """Change ``model``: every value of bf16 is of fp32, weights in files excepted."""
    graph = model.graph
    casts: list[ir.Value] = []
    for value in list(graph.initializers.values()):
        if value.const_value is None or value.const_value.dtype != NARROW:
            continue
        if isinstance(value.const_value, ir.ExternalTensor):
            casts.append(value)
        else:
            value.const_value = _wide(value.const_value)
            value.dtype = WIDE
    scopes: list[ir.Graph | ir.Function] = [graph, *model.functions.values()]
    for scope in scopes:
        _widen_values(scope)
        for node in scope.all_nodes():
            _widen_node(node)
    for value in casts:
        value.dtype = NARROW
        cast = ir.node(
            "Cast", [value], {"to": ir.AttrInt64("to", int(WIDE))}, name=f"{value.name}_wide"
        )
        out = cast.outputs[0]
        out.name, out.dtype, out.shape = f"{value.name}_wide", WIDE, value.shape
        value.replace_all_uses_with(out)
        cast.replace_input_with(0, value)
        graph.insert_before(graph[0], cast)
    return model


def _widen_values(scope: ir.Graph | ir.Function) -> None:
    for value in (*scope.inputs, *scope.outputs):
        if value.dtype == NARROW:
            value.dtype = WIDE


def _widen_node(node: ir.Node) -> None:
    for value in node.outputs:
        if value.dtype == NARROW:
            value.dtype = WIDE
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.INT and name in TYPES and attribute.value == NARROW:
            node.attributes[name] = ir.AttrInt64(name, int(WIDE))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == NARROW:
            node.attributes[name] = ir.AttrTensor(name, _wide(attribute.value))
        elif attribute.type == ir.AttributeType.GRAPH:
            _widen_values(attribute.value)


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype("float32"), dtype=WIDE, name=tensor.name)
