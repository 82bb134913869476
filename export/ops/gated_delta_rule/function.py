"""``lvlm::GatedDeltaRule`` as standard ops: tokens go in chunks, states from chunk to chunk.

Within a chunk all is products of matrices. What its tokens write into the state follows from a
triangular system: each corrects what those before it in the chunk wrote, too. Its inverse is put
together from the inverses of blocks along the diagonal, which double from 1 to the whole chunk: as
exact as substitution, in a few products. (Powers of the matrix would do it, too, but grow beyond
fp32 where keys repeat.)

Between chunks the state goes through a Scan. TensorRT has no loop of a number of turns that is not
known beside attention; there each chunk is a linear map of the state, and maps of neighbours are
put together, then those of pairs and so on: LEVELS times, whatever the length of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from lvlm.export.ops.op import Attribute
from lvlm.export.ops.parts.body import Body, Value

F32 = onnx.TensorProto.FLOAT
CHUNK = 64
LEVELS = 12  # of maps put together: 2 ** 12 chunks, the 262,144 tokens models are made for


@dataclass(frozen=True)
class TokenChunks:
    """n chunks of c tokens, ready to meet the state [B, Hk, G, dk, dv] before each; G = Hv / Hk.

    What a chunk writes is ``values`` less ``keys`` times the state; then the state is its former
    times ``decay`` plus ``spread`` times that, and its tokens read ``queries`` times the former
    plus ``within`` times that.
    """

    values: Value  # [n, B, Hk, G, c, dv]
    keys: Value  # [n, B, Hk, G, c, dk]
    decay: Value  # [n, B, Hk, G, 1, 1]
    spread: Value  # [n, B, Hk, G, dk, c]
    queries: Value  # [n, B, Hk, G, c, dk]
    within: Value  # [n, B, Hk, G, c, c]


def function(schema: onnx.defs.OpSchema, attributes: Mapping[str, Attribute]) -> onnx.FunctionProto:
    """The op with a Scan over chunks, for the attribute ``chunk``."""
    g, size = Body(), int(attributes.get("chunk", CHUNK))
    chunks = _chunks(g, size)
    b = Body("chunk_")
    names = ("values", "keys", "decay", "spread", "queries", "within")
    new, read = _meet(b, TokenChunks(*(f"chunk_{name}" for name in names)), "chunk_state")
    inputs = [_port(f"chunk_{name}") for name in ("state", *names)]
    body = helper.make_graph(b.nodes, "chunk", inputs, [_port(new), _port(read)])
    final, found = g.node(
        "Scan",
        _grouped_state(g),
        *(getattr(chunks, name) for name in names),
        count=2,
        body=body,
        num_scan_inputs=len(names),
    )
    return g.function(schema, [_in_order(g, found), _whole(g, final)], {"chunk": size})


def lowered(schema: onnx.defs.OpSchema, attributes: Mapping[str, Attribute]) -> onnx.FunctionProto:
    """The op without a loop, for TensorRT."""
    g, size = Body(), int(attributes.get("chunk", CHUNK))
    chunks = _chunks(g, size)
    width = g.dim("key", 3)
    diagonal = g.Unsqueeze(g.arange(width), g.const([1]))
    identity = g.Cast(g.Equal(diagonal, g.arange(width)), to=F32)
    # Of each chunk the map of the state: times, then plus
    times = g.Sub(g.Mul(identity, chunks.decay), g.MatMul(chunks.spread, chunks.keys))
    plus = g.MatMul(chunks.spread, chunks.values)
    index = g.arange(g.dim(times, 0))
    for level in range(LEVELS):  # to maps of 2 ** (level + 1) chunks up to each
        earlier = g.Sub(index, g.const(2**level))
        there = g.Reshape(g.GreaterOrEqual(earlier, g.const(0)), g.const([-1, 1, 1, 1, 1, 1]))
        earlier = g.Max(earlier, g.const(0))
        before = [g.Gather(x, earlier, axis=0) for x in (times, plus)]
        plus = g.Where(there, g.Add(g.MatMul(times, before[1]), plus), plus)
        times = g.Where(there, g.MatMul(times, before[0]), times)
    state = g.Unsqueeze(_grouped_state(g), g.const([0]))
    after = g.Add(g.MatMul(times, state), plus)
    count = g.dim(after, 0)
    whole = g.Concat(state, after, axis=0)
    before_each = g.Slice(whole, g.const([0]), count, g.const([0]))
    final = g.Squeeze(g.Slice(whole, count, g.Add(count, g.const([1])), g.const([0])), g.const([0]))
    _, found = _meet(g, chunks, before_each)
    return g.function(schema, [_in_order(g, found), _whole(g, final)], {"chunk": size})


def _chunks(g: Body, size: int) -> TokenChunks:
    """The inputs in chunks of ``size`` tokens; padding lets nothing decay and writes nothing."""
    rows = g.dim("key", 1)
    one = g.const([1])
    count = g.Div(g.Add(rows, g.const([size - 1])), g.const([size]))
    more = g.Sub(g.Mul(count, g.const([size])), rows)
    groups = g.Div(g.dim("value", 2), g.dim("key", 2))
    valid = g.Less(g.arange(rows), g.Unsqueeze("length", one))
    valid = g.Unsqueeze(valid, g.const([2]))
    zero = g.const(0, np.float32)

    def split(x: Value, heads: Value, rank: int) -> Value:
        """[B, N, H, …] -> [n, B, Hk, G or 1, c, …]"""
        behind = g.const([0] * (rank - 2))
        x = g.Pad(x, g.Concat(g.const([0] * rank), g.const([0]), more, behind, axis=0))
        last = [g.dim(x, 3)] if rank == 4 else []
        each = [g.dim(x, 0), count, g.const([size]), g.dim("key", 2), heads, *last]
        x = g.Reshape(x, g.Concat(*each, axis=0))
        return g.Transpose(x, perm=[1, 0, 3, 4, 2, *([5] if last else [])])

    query, key = (split(g.Cast(x, to=F32), one, 4) for x in ("query", "key"))
    value = split(g.Cast("value", to=F32), groups, 4)
    decay, beta = (split(g.Where(valid, x, zero), groups, 3) for x in ("decay", "beta"))
    # 1 more than the number of the highest digit in which two places differ, below the diagonal
    places = range(size)
    level = g.const(
        [[(i ^ j).bit_length() if i >= j else -1 for j in places] for i in places], np.int32
    )
    seen = g.GreaterOrEqual(level, g.const(0, np.int32))
    # Sums up to each token, [n, B, Hk, G, c, 1]; not CumSum, which TensorRT takes of late only
    column = g.Where(seen, g.Unsqueeze(decay, g.const([4])), zero)
    column = g.ReduceSum(column, g.const([5]), keepdims=1)
    apart = g.Sub(column, g.Transpose(column, perm=[0, 1, 2, 3, 5, 4]))
    apart = g.Where(seen, g.Exp(g.Where(seen, apart, zero)), zero)
    turned = g.Transpose(key, perm=[0, 1, 2, 3, 5, 4])
    beta = g.Unsqueeze(beta, g.const([5]))
    system = g.Mul(g.Mul(g.MatMul(key, turned), apart), beta)
    inverse = _inverse(g, system, level, size)
    faded = g.Exp(column)
    last = g.Slice(column, g.const([size - 1]), g.const([size]), g.const([4]))
    spread = g.Mul(key, g.Exp(g.Sub(last, column)))
    return TokenChunks(
        values=g.MatMul(inverse, g.Mul(value, beta)),
        keys=g.MatMul(inverse, g.Mul(key, g.Mul(beta, faded))),
        decay=g.Exp(last),
        spread=g.Transpose(spread, perm=[0, 1, 2, 3, 5, 4]),
        queries=g.Mul(query, faded),
        within=g.Mul(g.MatMul(query, turned), apart),
    )


def _inverse(g: Body, system: Value, level: Value, size: int) -> Value:
    """The inverse of 1 plus what of ``system`` [..., c, c] is below the diagonal."""
    zero = g.const(0, np.float32)
    inverse = g.const(np.eye(size), np.float32)
    for number in range(1, size.bit_length()):
        between = g.Where(g.Equal(level, g.const(number, np.int32)), system, zero)
        if number > 1:  # the inverse of blocks of one token is 1
            between = g.MatMul(g.MatMul(inverse, between), inverse)
        inverse = g.Sub(inverse, between)
    return inverse


def _meet(g: Body, chunks: TokenChunks, state: Value) -> tuple[Value, Value]:
    """The state after chunks, and what their tokens read, from the state before each."""
    written = g.Sub(chunks.values, g.MatMul(chunks.keys, state))
    read = g.Add(g.MatMul(chunks.queries, state), g.MatMul(chunks.within, written))
    new = g.Add(g.Mul(state, chunks.decay), g.MatMul(chunks.spread, written))
    return new, read


def _grouped_state(g: Body) -> Value:
    groups = g.Div(g.dim("value", 2), g.dim("key", 2))
    sizes = g.dim("state", 2), g.dim("state", 3)
    each = g.Concat(g.dim("state", 0), g.dim("key", 2), groups, *sizes, axis=0)
    return g.Reshape("state", each)


def _whole(g: Body, state: Value) -> Value:
    return g.Reshape(state, g.Shape("state"))


def _in_order(g: Body, found: Value) -> Value:
    """[n, B, Hk, G, c, dv] -> [B, N, Hv, dv], in the data's type."""
    found = g.Transpose(found, perm=[1, 0, 4, 2, 3, 5])
    sizes = g.dim("value", 2), g.dim("value", 3)
    found = g.Reshape(found, g.Concat(g.dim("value", 0), g.const([-1]), *sizes, axis=0))
    found = g.Slice(found, g.const([0]), g.dim("key", 1), g.const([1]))
    return g.CastLike(found, "value")


def _port(name: Value) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, F32, None)
