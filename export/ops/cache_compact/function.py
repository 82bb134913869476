"""``lvlm::CacheCompact`` as standard ops that ONNX Runtime and TensorRT both take.

The survivors' positions come from TopK, in order by a second one; a gather moves the entries.

Merging is a product with an assignment matrix (TensorRT refuses scatter-add), but not with the
whole [K, N] one, which costs more than the prompt's attention: buckets are runs of positions, so a
block of positions meets a run of slots no longer than itself. Blocks are summed by themselves, with
slots counted from the block's first; a slot's sum is that of the block it begins in plus the first
row of each later block that it reaches into. No term is subtracted: the sums are as exact as any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx

from lvlm.export.ops.op import Attribute
from lvlm.export.ops.parts.body import Body, Value

F32 = onnx.TensorProto.FLOAT
I64 = onnx.TensorProto.INT64
STATES = ("key", "value")
BLOCK = 32  # positions; 64 is as fast


@dataclass(frozen=True)
class KeptEntries:
    """Entries that stay, and who absorbs what: the slots from ``first`` to before ``end`` share the
    positions marked in ``source`` by the distance to their own."""

    index: Value  # [B, K]: positions, rising; N at unused slots
    first: int
    end: Value  # [B, 1]
    source: Value  # [B, N] bool
    own: bool  # ``source`` holds the survivors themselves


def compact_function(
    schema: onnx.defs.OpSchema, attributes: Mapping[str, Attribute]
) -> onnx.FunctionProto:
    """The body for the given mode and protected counts."""
    attributes = {"mode": "evict", "sinks": 1, "recent": 1, **attributes}
    sinks, recent = int(attributes["sinks"]), int(attributes["recent"])
    g = Body()
    extent = g.dim("key", 2)
    positions = g.arange(extent)
    length, budget = (g.Unsqueeze(name, g.const([1])) for name in ("length", "budget"))
    valid = g.Less(positions, length)
    finite = g.Less(g.Abs("importance"), g.const(np.inf, np.float32))
    score = g.Where(finite, "importance", g.const(0, np.float32))
    wrong = g.ReduceMax(g.Cast(g.And(valid, g.Not(finite)), to=I64), g.const([1]), keepdims=0)
    kept = g.Where(g.Greater(wrong, g.const(0)), g.const(-1), "budget")
    used = g.Less("slots", budget)

    if attributes["mode"] == "merge-reference":
        chosen = _as_released(g, score, positions, length, budget, sinks)
    else:
        edge = g.Or(
            g.Less(positions, g.const(sinks)),
            g.GreaterOrEqual(positions, g.Sub(length, g.const(recent))),
        )
        rank = g.Where(edge, g.const(np.inf, np.float32), score)
        rank = g.Where(valid, rank, g.const(-np.inf, np.float32))
        order = g.node("TopK", rank, g.dim("slots", 0), count=2, axis=1, largest=1)[1]
        index = _rising(g, g.Where(used, order, extent))
        chosen = KeptEntries(index, 0, budget, valid, own=True)

    if attributes["mode"] == "evict":
        states = [_placed(g, name, chosen.index) for name in STATES]
    else:
        buckets = _buckets(g, chosen, extent, length)
        states = [_merged(g, name, chosen.index, buckets) for name in STATES]
    kept_index = g.Where(used, chosen.index, g.const(-1))
    return g.function(schema, [*states, kept_index, kept], attributes)


def _rising(g: Body, index: Value) -> Value:
    """The ``slots`` smallest of each row, in order."""
    return g.node("TopK", index, g.dim("slots", 0), count=2, axis=1, largest=0, sorted=1)[0]


def _rows(g: Body, data: Value, index: Value) -> Value:
    """``data`` [B, H, N, d] at ``index`` [B, K] → [B, H, K, d]."""
    index = g.Unsqueeze(index, g.const([1, 3]))
    shape = g.Concat(g.Shape(data, start=0, end=2), g.const([1, 1]), axis=0)
    return g.GatherND(data, g.Expand(index, shape), batch_dims=2)


def _placed(g: Body, data: Value, index: Value, *more: Value) -> Value:
    """``data`` [B, H, N, d] at ``index`` [B, K]: N gives zeros, what is beyond a row of ``more``.

    A Where would do for the zeros, but ONNX Runtime's loses the sign of others.
    """
    shape = g.Concat(g.Shape(data, start=0, end=2), g.const([1]), g.dim(data, 3), axis=0)
    zero = g.Expand(g.CastLike(g.const(0, np.float32), data), shape)
    return _rows(g, g.Concat(data, zero, *more, axis=2), index)


def _as_released(
    g: Body, score: Value, positions: Value, length: Value, budget: Value, sinks: int
) -> KeptEntries:
    """See ``_as_released`` of the reference."""
    extent, one, first = g.dim("key", 2), g.const(1), g.const(sinks)
    forget = g.Sub(g.Sub(length, one), budget)
    middle = g.Sub(g.Sub(length, one), first)  # [B, 1]: how many there are
    inside = g.Less(positions, middle)
    shape = g.Shape(score)
    shifted = g.Expand(g.Min(g.Add(positions, first), g.Sub(extent, one)), shape)
    ranked = g.GatherElements(score, shifted, axis=1)
    ranked = g.Where(inside, ranked, g.const(np.inf, np.float32))
    order = g.node("TopK", ranked, extent, count=2, axis=1, largest=0, sorted=1)[1]
    before = g.Expand(g.Max(g.Sub(positions, first), g.const(0)), shape)
    selected = g.Greater(g.GatherElements(order, before, axis=1), forget)
    edge = g.Or(g.Less(positions, first), g.Equal(positions, g.Sub(length, one)))
    merges = g.Greater(forget, g.const(0))
    tail = g.GreaterOrEqual(positions, g.Sub(length, budget))
    stays = g.Or(g.And(merges, g.Or(edge, selected)), g.And(g.Not(merges), tail))
    index = _rising(g, g.Where(g.And(stays, g.Less(positions, length)), positions, extent))
    anchors = g.And(merges, g.Greater(budget, g.Add(first, one)))
    thrown = g.And(inside, g.LessOrEqual(order, forget))
    end = g.Sub(budget, one)
    return KeptEntries(index, sinks, end, g.And(thrown, anchors), own=False)


@dataclass(frozen=True)
class Buckets:
    """Positions that each slot absorbs, in blocks of positions."""

    position: Value  # [B, n * BLOCK]: what a block reads; beyond the valid: the last valid one
    assign: Value  # [B, 1, n, BLOCK, BLOCK] fp32: position → slot, counted from the block's first
    begin: Value  # [B, K]: block and row where a slot's sum begins
    reach: Value  # [B, 1, K, n] fp32: later blocks whose first row belongs to the slot
    count: Value  # [B, 1, K, 1] fp32
    own: bool


def _buckets(g: Body, chosen: KeptEntries, extent: Value, length: Value) -> Buckets:
    size, one = g.const([BLOCK]), g.const(1)
    blocks = g.Div(g.Add(extent, g.const([BLOCK - 1])), size)
    padded = g.Mul(blocks, size)
    batch, slots = g.dim("key", 0), g.dim("slots", 0)
    positions, block = g.arange(padded), g.arange(blocks)

    # Halfway between neighbours the slot changes; a tie still goes left.
    previous = g.Gather(chosen.index, g.Max(g.Sub("slots", one), g.const(0)), axis=1)
    begin = g.Add(g.Div(g.Add(previous, chosen.index), g.const(2)), one)
    changes = g.And(g.Greater("slots", g.const(chosen.first)), g.Less("slots", chosen.end))
    # Scatter indices are unique: what must not land goes to spare columns.
    target = g.Where(changes, begin, g.Add("slots", padded))
    marks = g.Expand(g.const(0), g.Concat(batch, g.Add(padded, slots), axis=0))
    marks = g.ScatterElements(marks, target, g.Expand(one, g.Shape(target)), axis=1)
    marks = g.Slice(marks, g.const([0]), padded, g.const([1]))
    slot = g.Add(g.CumSum(marks, g.const(1)), g.const(chosen.first))  # [B, n * BLOCK]

    in_blocks = g.Concat(batch, blocks, size, axis=0)
    slot = g.Reshape(slot, in_blocks)
    lead = g.Slice(slot, g.const([0]), g.const([1]), g.const([2]))  # [B, n, 1]
    local = g.Unsqueeze(g.Sub(slot, lead), g.const([2]))  # [B, n, 1, BLOCK]
    number = g.Unsqueeze(g.arange(size), g.const([1]))
    more = g.Concat(g.const([0] * 3), g.Sub(padded, extent), axis=0)
    source = g.Pad(g.Cast(chosen.source, to=I64), more)
    source = g.Cast(g.Reshape(source, in_blocks), to=onnx.TensorProto.BOOL)
    assign = g.And(g.Equal(number, local), g.Unsqueeze(source, g.const([2])))
    assign = g.Cast(assign, to=F32)  # [B, n, BLOCK, BLOCK]

    lead = g.Squeeze(lead, g.const([2]))
    begin = g.Where(changes, begin, g.const(0))
    home = g.Div(begin, g.const(BLOCK))
    row = g.Sub("slots", g.GatherElements(lead, home, axis=1))
    # Of an unused slot, anything.
    begin = g.Mod(g.Add(g.Mul(home, g.const(BLOCK)), g.Abs(row)), padded)
    at_lead = g.Gather(g.Reshape(marks, in_blocks), g.const(0), axis=2)  # [B, n]
    goes_on = g.And(g.Equal(at_lead, g.const(0)), g.Greater(block, g.const(0)))
    reach = g.Equal(g.Unsqueeze("slots", g.const([1])), g.Unsqueeze(lead, g.const([1])))
    reach = g.Cast(g.And(reach, g.Unsqueeze(goes_on, g.const([1]))), to=F32)  # [B, K, n]
    buckets = Buckets(
        position=g.Min(positions, g.Sub(length, one)),
        assign=g.Unsqueeze(assign, g.const([1])),
        begin=begin,
        reach=g.Unsqueeze(reach, g.const([1])),
        count="",
        own=chosen.own,
    )
    ones = g.ReduceSum(buckets.assign, g.const([-1]), keepdims=1)  # [B, 1, n, BLOCK, 1]
    absorbs = g.And(g.GreaterOrEqual("slots", g.const(chosen.first)), g.Less("slots", chosen.end))
    absorbs = g.Cast(g.Unsqueeze(absorbs, g.const([1, 3])), to=F32)
    return replace(buckets, count=g.Mul(_sums(g, ones, buckets), absorbs))


def _sums(g: Body, parts: Value, buckets: Buckets) -> Value:
    """Sums of the slots [B, H, K, d] from those of the blocks' rows [B, H, n, BLOCK, d]."""
    leads = g.Gather(parts, g.const(0), axis=3)  # [B, H, n, d]
    lead_shape = g.Shape(parts, start=0, end=2)
    flat = g.Concat(lead_shape, g.const([-1]), g.dim(parts, 4), axis=0)
    return g.Add(_rows(g, g.Reshape(parts, flat), buckets.begin), g.MatMul(buckets.reach, leads))


def _merged(g: Body, name: Value, index: Value, buckets: Buckets) -> Value:
    """Survivors as they are, or the mean of what a slot absorbs where that is anything."""
    blocks = g.Concat(g.Shape(name, start=0, end=2), g.const([-1, BLOCK]), g.dim(name, 3), axis=0)
    states = g.Reshape(g.Cast(_rows(g, name, buckets.position), to=F32), blocks)
    total = _sums(g, g.MatMul(buckets.assign, states), buckets)
    count, one = buckets.count, g.const(1, np.float32)
    if not buckets.own:
        total = g.Add(total, g.Cast(_placed(g, name, index), to=F32))
        count = g.Add(count, one)
    mean = g.CastLike(g.Div(total, g.Max(count, one)), name)
    absorbs = g.Squeeze(g.Greater(count, one), g.const([1, 3]))
    first_mean = g.Add(g.dim(name, 2), g.const([1]))
    source = g.Where(absorbs, g.Add("slots", first_mean), index)
    return _placed(g, name, source, mean)
