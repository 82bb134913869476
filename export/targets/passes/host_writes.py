"""Cache writes left to the host: a graph gives the new entries instead of whole new buffers.

For engines that cannot write into a buffer they read: their scatter copies every buffer twice a
step, their concatenation once, which at long caches is more than all the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from lvlm.core.errors import ExportError
from lvlm.export.ops.parts.body import Body
from lvlm.export.ops.parts.chunked_attention import capped
from lvlm.export.targets.passes.attention_sites import softcap_of
from lvlm.export.targets.passes.graph_edits import LOWERED_DOMAIN, identifier, lowered_function
from lvlm.export.targets.passes.ort_fusions import take_place
from lvlm.runtime.backends.openvino import SLOTS


@dataclass(frozen=True)
class Write:
    """``update`` [B,H,n,d] into ``cache`` [B,H,C,d] from slot ``index`` [B] on."""

    cache: ir.Value
    update: ir.Value
    index: ir.Value


def leave_writes_to_host(model: ir.Model) -> int:
    """Every TensorScatter that gives an output of the graph: the output becomes the update; how
    many there were.

    A last output SLOTS [writes,B] int64 has the slots they go to, in the order of the outputs.
    Attention over what was written becomes attention over the cache beside its new entry. Inputs
    that nothing reads any more go.
    """
    graph = model.graph
    nodes = [n for n in graph if n.domain == "" and n.op_type == "TensorScatter"]
    writes = {node.outputs[0]: _write(node) for node in nodes}
    for node in list(graph):
        if node.op_type == "Attention" and node.domain == "":
            keys, values = (writes.get(_before_cast(value)) for value in node.inputs[1:3])
            if keys is not None and values is not None:
                _attend_beside(model, node, keys, values)
    slots = []
    for number, output in enumerate(list(graph.outputs)):
        if (write := writes.get(output)) is not None:
            # A value of its own: two outputs, or an output and an input, may be one value.
            entry = _emit(graph, "Identity", write.update)
            entry.type, entry.shape = write.update.type, write.update.shape
            graph.outputs[number] = entry
            entry.name, output.name = output.name, f"{output.name}_whole"
            slots.append(write.index)
    if slots:
        axis = _emit(graph, "Constant", value_ints=[0])
        rows = [_emit(graph, "Unsqueeze", index, axis) for index in slots]
        all_slots = _emit(graph, "Concat", *rows, axis=0)
        all_slots.name, all_slots.type = SLOTS, ir.TensorType(ir.DataType.INT64)
        all_slots.shape = ir.Shape([len(slots), None])
        graph.outputs.append(all_slots)
    common.RemoveUnusedNodesPass()(model)
    if left := [n for n in graph if n.domain == "" and n.op_type == "TensorScatter"]:
        raise ExportError(
            f"{left[0].name} writes a cache that more than attention reads; this write cannot be "
            "left to the host"
        )
    buffers = [n for n in (str(v.name) for v in graph.outputs) if n.startswith("present_")]
    if slots and len(buffers) > len(slots):
        raise ExportError(f"not all of {', '.join(buffers)} are written from an index on")
    for value in list(graph.inputs):
        if value.name is not None and value.name.startswith("past_") and not value.uses():
            graph.inputs.remove(value)
    return len(nodes)


def _write(node: ir.Node) -> Write:
    linear = node.attributes.get_string("mode", "linear") == "linear"
    cache, update, index = (*node.inputs, None, None)[:3]
    fits = linear and node.attributes.get_int("axis", -2) in (-2, 2)
    if cache is None or update is None or index is None or not fits:
        raise ExportError(f"{node.name} writes a cache otherwise than from an index on axis 2")
    return Write(cache, update, index)


def _emit(graph: ir.Graph, op: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
    node = ir.node(op, list(inputs), attributes=attributes)
    graph.append(node)
    return node.outputs[0]


def _before_cast(value: ir.Value | None) -> ir.Value:
    """The value that was cast from the type of a low-precision cache; without a Cast ``value``
    itself."""
    assert value is not None
    cast = value.producer()
    if cast is None or cast.op_type != "Cast" or cast.inputs[0] is None:
        return value
    return cast.inputs[0]


def _attend_beside(model: ir.Model, node: ir.Node, keys: Write, values: Write) -> None:
    query, mask = node.inputs[0], node.inputs[3] if len(node.inputs) > 3 else None
    if query is None or mask is None:
        raise ExportError(f"{node.name} attends over a cache without a mask")
    assert query.shape is not None
    assert keys.update.shape is not None
    heads, kv_heads, width = query.shape[1], keys.update.shape[1], query.shape[3]
    sizes = (heads, kv_heads, width, keys.update.shape[2], query.shape[2])
    if not all(isinstance(size, int) for size in sizes) or sizes[3:] != (1, 1):
        raise ExportError(f"{node.name} is not attention of one query per row, of static heads")
    scale = node.attributes.get_float("scale", float(sizes[2]) ** -0.5)  # type: ignore[arg-type]
    softcap, fp32 = softcap_of(node), query.dtype == ir.DataType.FLOAT
    proto = _attention(heads, kv_heads, width, scale, softcap, fp32)  # type: ignore[arg-type]
    function = ir.serde.deserialize_function(proto)
    model.functions.setdefault(function.identifier(), function)
    model.opset_imports[LOWERED_DOMAIN] = 1
    given = [query, keys.cache, values.cache, keys.update, values.update, keys.index, mask]
    call = ir.Node(LOWERED_DOMAIN, function.name, given, num_outputs=1, name=node.name)
    model.graph.insert_before(node, call)
    take_place(node.outputs[0], call.outputs[0])
    model.graph.remove(node, safe=True)


def _attention(
    heads: int, kv_heads: int, width: int, scale: float, softcap: float, fp32: bool
) -> onnx.FunctionProto:
    """Attention of one query q [B,heads,1,d] over k and v [B,kv_heads,C,d] where ``mask``
    [B,1,1,C] allows it, but in slot index[b] over ``key`` and ``value`` [B,kv_heads,1,d].

    The cache may be of another type than q."""
    g = Body()
    k, v, key, value = (g.CastLike(name, "q") for name in ("k", "v", "key", "value"))
    # [B,kv,G,d] x [B,kv,d,C]: the heads of a group share keys without copying them.
    query = g.Reshape("q", g.const([0, kv_heads, heads // kv_heads, width]))
    factor = g.const(scale, np.float32)
    query = g.Mul(query, factor if fp32 else g.CastLike(factor, "q"))
    slots = g.dim("k", 2)
    stale = g.Equal(g.arange(slots), g.Unsqueeze("index", g.const([1, 2, 3])))
    # The cache is the product's first operand: as the second it would be transposed each time.
    scores = g.Transpose(g.MatMul(k, g.Transpose(query, perm=[0, 1, 3, 2])), perm=[0, 1, 3, 2])
    own = g.MatMul(query, g.Transpose(key, perm=[0, 1, 3, 2]))
    if not fp32:
        scores, own = (g.Cast(s, to=onnx.TensorProto.FLOAT) for s in (scores, own))
    scores, own = capped(g, scores, softcap), capped(g, own, softcap)
    seen = g.And("mask", g.Not(stale))
    scores = g.Where(seen, scores, g.const(-3.0e38, np.float32))
    weights = g.Softmax(g.Concat(scores, own, axis=-1), axis=-1)
    weights = weights if fp32 else g.CastLike(weights, "q")
    past = g.Slice(weights, g.const([0]), slots, g.const([3]))
    last = g.Slice(weights, slots, g.const([2**31 - 1]), g.const([3]))
    mixed = g.Add(g.MatMul(past, v), g.Mul(last, value))
    result = g.Reshape(mixed, g.const([0, heads, 1, width]))
    name = identifier("AttentionBeside", heads, kv_heads, width, f"{scale:.9g}", softcap, fp32)
    given = ["q", "k", "v", "key", "value", "index", "mask"]
    return lowered_function(name, given, g.nodes, result)
