"""Attention over chunks of queries as standard ops: the body that two ops share.

A Scan takes one chunk after the other and carries the sum of what each key received. Heads of a
group stand under each other, so that keys are never repeated. CausalAttention lets a chunk see the
keys up to its end only, which is half the work; in a given number of chunks it sees all keys, as
CacheImportance does (TensorRT wants fixed shapes inside a Scan).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from lvlm.export.ops.op import DOMAIN
from lvlm.export.ops.parts.body import Body, Value

F32 = onnx.TensorProto.FLOAT
# Chunks of a loop that TensorRT runs: it wants to know how many turns there are.
PARTS = 16
LOWEST = -3.4e38  # finite: a row that sees nothing gives no NaN


def importance_function(
    schema: onnx.defs.OpSchema, chunk: int, parts: int, softcap: float
) -> onnx.FunctionProto:
    """CacheImportance; ``parts``: that many chunks, as large as it takes, instead of ``chunk``."""
    g = Body()
    length = g.Unsqueeze("length", g.const([1]))
    slots = g.Where(g.Less("query_slot", length), "query_slot", g.const(-1))
    if parts == 1:
        total = _at_once(g, slots, softcap)
    elif parts:
        count = g.const([parts])
        chunks = _split(g, count, _share(g, g.dim("query", 2), count), slots)
        total = _scan(g, chunks, scored=True, softcap=softcap)[0]
    else:
        total = _scan(g, _split_by(g, chunk, slots), scored=True, softcap=softcap)[0]
    built_for = {"chunk": chunk, "parts": parts, **({"softcap": softcap} if softcap else {})}
    return g.function(schema, [_finish(g, total, length)], built_for, required=["scale"])


def attention_function(
    schema: onnx.defs.OpSchema, scored: bool, *, chunk: int = 0, parts: int = 0
) -> onnx.FunctionProto:
    """CausalAttention; ``scored``: with its importance; ``parts`` as above."""
    g = Body()
    rows = g.dim("query", 2)
    slots = g.Unsqueeze(g.arange(rows), g.const([0]))
    length = ""
    if scored:
        length = g.Unsqueeze("length", g.const([1]))
        slots = g.Where(g.Less(slots, length), slots, g.const(-1))
    if parts:
        count = g.const([parts])
        chunks = _split(g, count, _share(g, rows, count), slots)
    else:
        chunks = _split_by(g, chunk, slots)
    *total, output = _scan(g, chunks, scored, value="value", sliced=not parts)
    batch, heads, width = (g.dim("query", axis) for axis in (0, 1, 3))
    each = g.Concat(chunks.count, batch, heads, chunks.extent, width, axis=0)
    output = g.Transpose(g.Reshape(output, each), perm=[1, 2, 0, 3, 4])
    output = g.Reshape(output, g.Concat(batch, heads, g.const([-1]), width, axis=0))
    output = g.CastLike(g.Slice(output, g.const([0]), rows, g.const([2])), "query")
    built_for = {"chunk": chunk, "importance": int(scored)}
    results = [output, *(_finish(g, t, length) for t in total)]
    inputs = None if scored else schema.min_input
    return g.function(schema, results, built_for, required=["scale"], inputs=inputs)


@dataclass(frozen=True)
class Chunks:
    """The queries, ready for a Scan."""

    count: Value  # [1]: n
    extent: Value  # [1]: rows of a chunk
    query: Value  # [n, B, Hkv, G * extent, d]
    slots: Value  # [n, B or 1, extent]: each row's own key, -1: unused row


def _share(g: Body, whole: Value, parts: Value) -> Value:
    """``whole`` / ``parts``, rounded up."""
    return g.Div(g.Add(whole, g.Sub(parts, g.const([1]))), parts)


def _split_by(g: Body, chunk: int, slots: Value) -> Chunks:
    size = g.const([chunk])
    return _split(g, _share(g, g.dim("query", 2), size), size, slots)


def _split(g: Body, count: Value, size: Value, slots: Value) -> Chunks:
    batch, heads, rows, width = (g.dim("query", axis) for axis in range(4))
    key_heads = g.dim("key", 1)
    more = g.Sub(g.Mul(count, size), rows)
    query = g.Pad("query", g.Concat(g.const([0] * 6), more, g.const([0]), axis=0))
    query = g.Reshape(query, g.Concat(batch, heads, count, size, width, axis=0))
    query = g.Transpose(query, perm=[2, 0, 1, 3, 4])
    query = g.Reshape(query, g.Concat(count, batch, key_heads, g.const([-1]), width, axis=0))
    slots = g.Pad(slots, g.Concat(g.const([0] * 3), more, axis=0), g.const(-1))
    slots = g.Reshape(slots, g.Concat(g.dim(slots, 0), count, size, axis=0))
    return Chunks(count, size, query, g.Transpose(slots, perm=[1, 0, 2]))


def _at_once(g: Body, slots: Value, softcap: float) -> Value:
    """Attention that each key received of all queries, without a loop: the turned keys stay a flag
    of the product."""
    batch, width = g.dim("query", 0), g.dim("query", 3)
    size, end = g.dim("query", 2), g.dim("key", 2)
    keys = g.Transpose(g.Cast("key", to=F32), perm=[0, 1, 3, 2])
    grouped = g.Concat(batch, g.dim("key", 1), g.const([-1]), width, axis=0)
    scale = g.attribute("scale", "value_float", onnx.AttributeProto.FLOAT)
    query = g.Mul(g.Cast(g.Reshape("query", grouped), to=F32), scale)
    shape = [batch, g.dim("query", 1), size, end]
    logits = capped(g, g.MatMul(query, keys), softcap)
    return _received(g, _attention(g, logits, slots, shape), slots, shape)


def capped(b: Body, logits: Value, softcap: float) -> Value:
    """softcap · tanh(logits / softcap), fp32; the logits themselves where it is 0."""
    if not softcap:
        return logits
    cap = b.const(softcap, np.float32)
    return b.Mul(b.Tanh(b.Div(logits, cap)), cap)


def _attention(b: Body, logits: Value, slots: Value, shape: list[Value]) -> Value:
    """[B, Hq, r, n] of logits [B, Hkv, G * r, n]; slots [B or 1, r]; ``shape``: B, Hq, r and n."""
    logits = b.Reshape(logits, b.Concat(*shape, axis=0))
    slots = b.Unsqueeze(slots, b.const([1, 3]))
    # Before the softmax: whatever padding holds is gone, even NaN.
    seen = b.LessOrEqual(b.arange(shape[-1]), slots)
    return b.Softmax(b.Where(seen, logits, b.const(LOWEST, np.float32)), axis=-1)


def _received(b: Body, attention: Value, slots: Value, shape: list[Value]) -> Value:
    """[B, n]: attention summed over heads and used rows."""
    batch, heads, size, end = shape
    used = b.Cast(b.GreaterOrEqual(slots, b.const(0)), to=F32)
    used = b.Expand(b.Unsqueeze(used, b.const([1])), b.Concat(batch, heads, size, axis=0))
    # One product instead of a sum: unused rows weigh 0 and are finite.
    used = b.Reshape(used, b.Concat(batch, b.const([1, -1]), axis=0))
    rows = b.Reshape(attention, b.Concat(batch, b.const([-1]), end, axis=0))
    return b.Squeeze(b.MatMul(used, rows), b.const([1]))


def _scan(
    g: Body,
    chunks: Chunks,
    scored: bool,
    value: Value | None = None,
    sliced: bool = False,
    softcap: float = 0,
) -> list[Value]:
    """Sum of attention [B, N] over heads and used rows, if ``scored``; attention over ``value``
    [n, B, Hkv, G * extent, d], if given. ``sliced``: each chunk reads the keys and values up to its
    end, in fp32; otherwise all of them, the values in their own type, as fused kernels do."""
    batch, heads, positions = g.dim("key", 0), g.dim("query", 1), g.dim("key", 2)
    keys = g.Transpose(g.Cast("key", to=F32), perm=[0, 1, 3, 2])
    scale = g.attribute("scale", "value_float", onnx.AttributeProto.FLOAT)
    size = chunks.extent

    b = Body("chunk_")
    # The chunk's type is that of the queries, which a function cannot know.
    inputs = [
        helper.make_empty_tensor_value_info("chunk_query"),
        _port("chunk_slots", onnx.TensorProto.INT64),
    ]
    scanned, carried, outputs = [chunks.query, chunks.slots], [], []
    end = positions
    if value is not None and sliced:
        value = g.Cast(value, to=F32)
        scanned.append(g.Mul(g.Add(g.arange(chunks.count), g.const(1)), size))
        inputs.append(_port("chunk_end", onnx.TensorProto.INT64))
        end = b.Min(b.Unsqueeze("chunk_end", b.const([0])), positions)
        keys = b.Slice(keys, b.const([0]), end, b.const([3]))
    logits = capped(b, b.MatMul(b.Mul(b.Cast("chunk_query", to=F32), scale), keys), softcap)
    grouped = b.Shape(logits)
    shape = [batch, heads, size, end]
    attention = _attention(b, logits, "chunk_slots", shape)
    if scored:
        received = _received(b, attention, "chunk_slots", shape)
        if sliced:
            rest = b.Sub(positions, end)
            received = b.Pad(received, b.Concat(b.const([0] * 3), rest, axis=0))
        inputs.insert(0, _port("chunk_sum"))
        carried.append(g.Expand(g.const(0, np.float32), g.Concat(batch, positions, axis=0)))
        outputs.append(b.Add("chunk_sum", received))
    if value is not None:
        attention = b.Reshape(attention, grouped)
        if sliced:
            mixed = b.MatMul(attention, b.Slice(value, b.const([0]), end, b.const([2])))
        else:
            mixed = b.Cast(b.MatMul(b.CastLike(attention, value), value), to=F32)
        outputs.append(mixed)

    body = helper.make_graph(b.nodes, "chunk", inputs, [_port(name) for name in outputs])
    return list(
        g.node(
            "Scan",
            *carried,
            *scanned,
            count=len(outputs),
            body=body,
            num_scan_inputs=len(scanned),
        )
    )


def _finish(g: Body, total: Value, length: Value) -> Value:
    """Importance from the sum over heads: their mean; padding is 0."""
    heads = g.Cast(g.dim("query", 1), to=F32)
    valid = g.Less(g.arange(g.dim("key", 2)), length)
    return g.Where(valid, g.Div(total, heads), g.const(0, np.float32))


def _port(name: Value, dtype: int = F32) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, None)


def lowered_attention(schema: onnx.defs.OpSchema, chunk: int, scored: bool) -> onnx.FunctionProto:
    """CausalAttention where a kernel for standard attention is better than slices."""
    g = Body()
    results = [g.Attention("query", "key", "value", is_causal=1)]
    g.read_attribute("scale", "scale", onnx.AttributeProto.FLOAT)
    if scored:
        shape = g.Concat(g.dim("key", 0), g.dim("key", 2), axis=0)
        slots = g.Expand(g.arange(g.dim("key", 2)), shape)
        given = ["query", "key", slots, "length"]
        results += g.node("CacheImportance", *given, chunk=chunk, domain=DOMAIN)
        g.read_attribute("scale", "scale", onnx.AttributeProto.FLOAT)
    built_for = {"chunk": chunk, "importance": int(scored)}
    inputs = None if scored else schema.min_input
    return g.function(schema, results, built_for, required=["scale"], inputs=inputs)
