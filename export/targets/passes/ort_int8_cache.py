"""Attention of one new token over a cache in 8 bits, as functions of standard nodes.

GroupQueryAttention, which stands for caches of floats (ort_attention.py), takes 8 bits with fixed
scales only. Here the valid entries are spread to floats at every call; a kernel of our own reads
them as they are.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from lvlm.export.ops.op import OPSET
from lvlm.export.ops.parts.body import Body, Value
from lvlm.export.ops.parts.int8_entries import dequantize, quantize
from lvlm.export.targets.passes.graph_edits import LOWERED_DOMAIN

KINDS = {
    "num_heads": onnx.AttributeProto.INT,
    "kv_num_heads": onnx.AttributeProto.INT,
    "scale": onnx.AttributeProto.FLOAT,
}


def appended(name: str, inputs: list[str], outputs: list[str]) -> onnx.FunctionProto:
    """Rotary embedding, write to slot ``last``, attention; as ort_attention.py says of it."""
    g = Body()
    half = g.dim("cos", 1)
    width = g.Mul(half, g.const([2]))
    heads, key_heads = (_count(g, name) for name in ("num_heads", "kv_num_heads"))
    sizes = g.Concat(g.Mul(heads, width), *[g.Mul(key_heads, width)] * 2, axis=0)
    parts = g.node("Split", "qkv", sizes, count=3, axis=2)
    query, key, value = (
        _by_heads(g, part, count, width)
        for part, count in zip(parts, (heads, key_heads, key_heads), strict=True)
    )
    query, key = (g.RotaryEmbedding(x, "cos", "sin", "position_ids") for x in (query, key))
    index = g.Cast("last", to=onnx.TensorProto.INT64)
    for name_of, x in (("key", key), ("value", value)):
        written = [f"past_{name_of}", quantize(g, x), index]
        g.nodes.append(helper.make_node("TensorScatter", written, [f"present_{name_of}"], axis=-2))
    _attend(g, query, "present_key", "present_value", outputs[0])
    return _function(name, inputs, outputs, g)


def read(name: str, inputs: list[str], outputs: list[str]) -> onnx.FunctionProto:
    """Attention over what is written already."""
    g = Body()
    heads = _count(g, "num_heads")
    width = g.Sub(g.dim("key", 3), g.const([1]))
    _attend(g, _by_heads(g, "query", heads, width), "key", "value", outputs[0])
    return _function(name, inputs, outputs, g)


def _count(g: Body, attribute: str) -> Value:
    return g.Unsqueeze(g.attribute(attribute, "value_int", KINDS[attribute]), g.const([0]))


def _by_heads(g: Body, x: Value, heads: Value, width: Value) -> Value:
    """[B,1,H*d] as [B,H,1,d]."""
    return g.Reshape(x, g.Concat(g.const([0]), heads, g.const([1]), width, axis=0))


def _attend(g: Body, query: Value, keys: Value, values: Value, output: str) -> None:
    """``output`` [B,1,Hq*d] of queries [B,Hq,1,d] over each row's entries up to ``last``."""
    longest = g.Reshape(g.Cast("longest", to=onnx.TensorProto.INT64), g.const([1]))
    seen = [
        g.CastLike(dequantize(g, g.Slice(x, g.const([0]), longest, g.const([2]))), query)
        for x in (keys, values)
    ]
    last = g.Unsqueeze(g.Cast("last", to=onnx.TensorProto.INT64), g.const([1]))
    mask = g.Unsqueeze(g.LessOrEqual(g.arange(longest), last), g.const([1, 2]))
    mixed = g.Attention(query, *seen, mask)
    g.read_attribute("scale", "scale", KINDS["scale"])
    shape = g.const(np.array([0, 1, -1]))
    g.nodes.append(helper.make_node("Reshape", [mixed, shape], [output]))


def _function(name: str, inputs: list[str], outputs: list[str], g: Body) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_function(
        LOWERED_DOMAIN, name, inputs, outputs, g.nodes, opsets, attributes=list(KINDS)
    )
