"""Graph passes that targets are made of; each takes an onnx-ir model and changes it in place."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir
from onnx import helper
from onnx_ir.passes import common

from lvlm.export.ops._contract import DOMAIN, OPSET, Attribute, Op
from lvlm.runtime.discovery import discover
from lvlm.runtime.errors import ExportError

LOWERED_DOMAIN = "lvlm.lowered"


def fix_dimensions(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Make the dynamic dimensions named in ``sizes`` static, wherever they appear."""
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        if value.shape is not None:
            dims = [sizes.get(str(d), d) if not isinstance(d, int) else d for d in value.shape]
            value.shape = ir.Shape(dims)


def lower_ops(model: ir.Model) -> None:
    """Replace every lvlm op that has a form for TensorRT (``Op.lowered``) by the nodes of that
    form, and add the functions of the lvlm ops among them.

    Postcondition: what an optional output alone was computed from is gone where nothing reads it.
    """
    ops: dict[str, Op] = discover("lvlm.export.ops", "OP")
    lowered = set()
    for node in model.graph:
        if node.domain == DOMAIN and (form := ops[node.op_type].lowered) is not None:
            function = ir.serde.deserialize_function(form(_attributes(node)))
            model.functions[function.identifier()] = function
            lowered.add(function.identifier())
    common.InlinePass(lambda function: function.identifier() in lowered)(model)
    common.RemoveUnusedNodesPass()(model)
    for node in model.graph:
        if node.domain == DOMAIN:
            _add_function(model, ops[node.op_type].function(_attributes(node)))


def _attributes(node: ir.Node) -> dict[str, Attribute]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _add_function(model: ir.Model, proto: onnx.FunctionProto) -> None:
    function = ir.serde.deserialize_function(proto)
    known = model.functions.setdefault(function.identifier(), function)
    if dict(known.attributes) != dict(function.attributes):
        raise ExportError(f"two variants of {function.name} in one graph")


def write_out_attention(model: ir.Model) -> int:
    """Replace fp32 Attention by matrix products and a softmax; returns how many there were.

    Precondition: 4-D inputs with static head counts, no cache inputs. One query row would build
    with grouped heads, but not with as many key as query heads; so all of fp32 is written out.
    """
    replaced = 0
    for node in model.graph:
        if node.domain != "" or node.op_type != "Attention" or len(node.outputs) != 1:
            continue
        query, key = node.inputs[0], node.inputs[1]
        if query is None or key is None or query.shape is None or key.shape is None:
            raise ExportError(f"the shape of {node.name} is unknown; it cannot be written out")
        if query.dtype != ir.DataType.FLOAT:
            continue
        heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
        if not (isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(head_dim, int)):
            raise ExportError(f"the heads of {node.name} are not static; it cannot be written out")
        causal = node.attributes.get_int("is_causal", 0) == 1
        scale = node.attributes.get_float("scale", 1.0)
        function = ir.serde.deserialize_function(
            _attention(heads, kv_heads, head_dim, causal, scale, masked=len(node.inputs) == 4)
        )
        model.functions[function.identifier()] = function
        model.opset_imports[LOWERED_DOMAIN] = 1
        node.domain, node.op_type = LOWERED_DOMAIN, function.name
        node.attributes.clear()
        replaced += 1
    return replaced


def _attention(
    heads: int, kv_heads: int, head_dim: int, causal: bool, scale: float, masked: bool
) -> onnx.FunctionProto:
    """Attention over q [B,heads,N,d], k and v [B,kv_heads,S,d] in ops every version knows; where
    ``masked`` a boolean mask [B,1,1,S] says which keys are seen."""
    group = heads // kv_heads
    node = helper.make_node
    nodes = [
        # [B,kv,G,N,d] x [B,kv,1,d,S]: the heads of a group share keys without copying them.
        node("Constant", [], ["split"], value_ints=[0, kv_heads, group, -1, head_dim]),
        node("Reshape", ["q", "split"], ["q5"]),
        node("Constant", [], ["axis"], value_ints=[2]),
        node("Unsqueeze", ["k", "axis"], ["k5"]),
        node("Unsqueeze", ["v", "axis"], ["v5"]),
        node("Transpose", ["k5"], ["kt"], perm=[0, 1, 2, 4, 3]),
        node("Constant", [], ["scale"], value_float=scale),
        node("Mul", ["q5", "scale"], ["qs"]),
        node("MatMul", ["qs", "kt"], ["scores"]),
    ]
    seen = "scores"
    if masked:
        nodes += [
            node("Unsqueeze", ["mask", "axis"], ["mask5"]),
            node("Constant", [], ["hidden"], value_float=-3.0e38),
            node("Where", ["mask5", "scores", "hidden"], ["visible"]),
        ]
        seen = "visible"
    if causal:
        nodes += [
            node("Shape", ["q"], ["rows"], start=2, end=3),
            node("Squeeze", ["rows"], ["n"]),
            node("Constant", [], ["zero"], value_int=0),
            node("Constant", [], ["one"], value_int=1),
            node("Range", ["zero", "n", "one"], ["at"]),
            node("Constant", [], ["last"], value_ints=[1]),
            node("Unsqueeze", ["at", "last"], ["row"]),
            node("GreaterOrEqual", ["row", "at"], ["sees"]),
            node("Constant", [], ["never"], value_float=-3.0e38),
            node("Where", ["sees", seen, "never"], ["past"]),
        ]
        seen = "past"
    nodes += [
        node("Softmax", [seen], ["weights"], axis=-1),
        node("MatMul", ["weights", "v5"], ["out5"]),
        node("Constant", [], ["joined"], value_ints=[0, heads, -1, head_dim]),
        node("Reshape", ["out5", "joined"], ["out"]),
    ]
    name = f"Attention_{heads}_{kv_heads}_{head_dim}"
    name += ("_causal" if causal else "") + ("_masked" if masked else "")
    inputs = ["q", "k", "v", *(["mask"] if masked else [])]
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_function(LOWERED_DOMAIN, name, inputs, ["out"], nodes, opsets)
