"""Attention of new tokens over a cache as one node: they are turned, written and attend at once.

The node is a function of the standard nodes that it takes the place of, so that a kernel of our own
can do it without a copy of the entries that are there.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import helper

from lvlm.export.ops.op import OPSET
from lvlm.export.ops.parts.body import Body, Value
from lvlm.export.ops.parts.int8_entries import dequantize, quantize
from lvlm.export.targets.passes.attention_sites import find_site_behind
from lvlm.export.targets.passes.graph_edits import LOWERED_DOMAIN
from lvlm.export.targets.passes.ort_attention import packed
from lvlm.export.targets.passes.ort_fusions import take_place

NAME = "ExtendAttention"
# qkv [B,T,(Hq+2Hkv)*d]; the cache [B,Hkv,C,d]; its slot of the first new entry [B] int64; the slots
# of the entries before [P] int64, those seen being none that is written; cos and sin [B,T,d/2];
# what a token sees of these P entries and then of the T new ones, bool [B or 1,1,T,P+T]
INPUTS = ["qkv", "past_key", "past_value", "write_index", "past_slots", "cos", "sin", "mask"]
OUTPUTS = ["output", "present_key", "present_value"]  # output [B,T,Hq*d]
KINDS = {
    "num_heads": onnx.AttributeProto.INT,
    "kv_num_heads": onnx.AttributeProto.INT,
    "head_size": onnx.AttributeProto.INT,
    "scale": onnx.AttributeProto.FLOAT,
}


def extend_attention(model: ir.Model) -> int:
    """Use it for Attention over gathered entries and the new ones behind them; how often."""
    sites = [it for node in model.graph if (it := find_site_behind(node)) is not None]
    for site, slots in sites:
        writes = site.writes
        given = [packed(model, site), *(write.inputs[0] for write in writes), writes[0].inputs[2]]
        node = ir.node(
            NAME,
            [*given, slots, *site.angles, site.node.inputs[3]],
            attributes={
                "num_heads": site.heads,
                "kv_num_heads": site.kv_heads,
                "head_size": site.width,
                "scale": site.node.attributes["scale"].as_float(),
            },
            domain=LOWERED_DOMAIN,
            num_outputs=len(OUTPUTS),
        )
        model.graph.insert_before(site.node, node)
        replaced = site.result, *(write.outputs[0] for write in writes)
        for old, new in zip(replaced, node.outputs, strict=True):
            take_place(old, new)
    if sites:
        cache = sites[0][0].writes[0].inputs[0]
        int8 = cache is not None and cache.dtype == ir.DataType.INT8
        function = ir.serde.deserialize_function(attention_behind(int8=int8))
        model.functions[function.identifier()] = function
        model.opset_imports[LOWERED_DOMAIN] = 1
    return len(sites)


def attention_behind(*, int8: bool = False) -> onnx.FunctionProto:
    """The function, over a cache of floats or of 8 bits; its heads and scale are the node's."""
    g = Body()
    heads, key_heads, width = (
        g.Unsqueeze(g.attribute(name, "value_int", kind), g.const([0]))
        for name, kind in KINDS.items()
        if kind == onnx.AttributeProto.INT
    )
    sizes = g.Concat(g.Mul(heads, width), *[g.Mul(key_heads, width)] * 2, axis=0)
    parts = g.node("Split", "qkv", sizes, count=3, axis=2)
    query, key, value = (
        g.Transpose(g.Reshape(x, g.Concat(g.const([0, 0]), n, width, axis=0)), perm=[0, 2, 1, 3])
        for x, n in zip(parts, (heads, key_heads, key_heads), strict=True)
    )
    query, key = (g.RotaryEmbedding(x, "cos", "sin") for x in (query, key))
    seen = [_behind(g, "key", key, int8), _behind(g, "value", value, int8)]
    mixed = g.Attention(query, *seen, "mask")
    g.read_attribute("scale", "scale", onnx.AttributeProto.FLOAT)
    joined = g.Transpose(mixed, perm=[0, 2, 1, 3])
    g.nodes.append(helper.make_node("Reshape", [joined, g.const([0, 0, -1])], [OUTPUTS[0]]))
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_function(
        LOWERED_DOMAIN, NAME, INPUTS, OUTPUTS, g.nodes, opsets, attributes=list(KINDS)
    )


def _behind(g: Body, name: str, new: Value, int8: bool) -> Value:
    """New entries behind those of the past; and written."""
    past = f"past_{name}"
    held = quantize(g, new) if int8 else g.CastLike(new, past)
    written = [past, held, "write_index"]
    g.nodes.append(helper.make_node("TensorScatter", written, [f"present_{name}"], axis=-2))
    before = g.Gather(past, "past_slots", axis=2)
    before = dequantize(g, before) if int8 else before
    return g.Concat(g.CastLike(before, new), new, axis=2)
