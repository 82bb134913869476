"""``lvlm::TokenMerge`` as standard ops that ONNX Runtime and TensorRT both take.

No size depends on data, no scatter adds, nothing loops. The plan: rank with TopK; write for every
position where its hidden state will come from (``source``: itself, a centre, or -1: gone); a
running count gives the new indices; the inverse of those gathers the result.

Scatter indices are unique, as the standard demands: what must not land goes to spare columns of its
own, cut off afterwards. TensorRT refuses ``reduction="add"``, so sums over absorbed tokens are
gathers (recycle) or a matrix product (nearest).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from lvlm.export.ops.op import Attribute
from lvlm.export.ops.parts.body import Body, Value

F32 = onnx.TensorProto.FLOAT
I64 = onnx.TensorProto.INT64
NO_PAIR = -2.0  # below every cosine
LOWEST = float(np.finfo(np.float32).min)  # below every dot product
EPSILON = 1e-12  # least norm in a cosine: that of a zero vector is 0 with everything


@dataclass(frozen=True)
class Ranked:
    """Ranked tokens, from which every rule starts."""

    extent: Value  # [1]: N
    valid: Value  # [B, N] bool: not padding
    member: Value  # [B, M, N] bool: token of image m + 1
    order: Value  # [B, M, K]: positions by rank
    used: Value  # [B, M, K] bool: slot < keep
    spare: Value  # [M, K]: N + m K + slot, a number of its own for every slot


def token_merge_function(
    schema: onnx.defs.OpSchema, attributes: Mapping[str, Attribute]
) -> onnx.FunctionProto:
    """The body for ``attributes["merge"]``: four rules, four bodies, one set of formal names
    (``recycle`` and ``recycle_slots`` only where the rule takes them). A model therefore holds one
    rule, and one ``absorb``.
    """
    attributes = {"merge": "recycle", "absorb": 5, **attributes}
    g = Body()
    ranked = _rank(g)
    if attributes["merge"] == "recycle":
        result = _recycle(g, ranked, int(attributes["absorb"]))
    elif attributes["merge"] == "illava":
        result = _illava(g, ranked, int(attributes["absorb"]))
    elif attributes["merge"] == "nearest":
        result = _nearest(g, ranked)
    else:
        source = _source(g, ranked, ranked.order)
        result = _finish(g, ranked, source, "hidden", _new_index(g, source))
    inputs = None if attributes["merge"] in ("recycle", "illava") else schema.min_input
    return g.function(schema, result, attributes, inputs=inputs)


def _rank(g: Body) -> Ranked:
    extent = g.dim("hidden", 1)
    tokens = g.arange(extent)
    valid = g.GreaterOrEqual("image_id", g.const(0))
    last = g.ReduceMax(g.Where(valid, tokens, g.const(-1)), g.const([1]), keepdims=1)
    first_of_all = g.const(np.inf, np.float32)
    importance = g.Where(g.Equal(tokens, last), first_of_all, "importance")
    images, slots = g.dim("keep", 1), g.dim("keep_slots", 0)
    number = g.Unsqueeze(g.Add(g.arange(images), g.const(1)), g.const([1]))
    member = g.Equal(g.Unsqueeze("image_id", g.const([1])), number)
    score = g.Where(member, g.Unsqueeze(importance, g.const([1])), g.const(-np.inf, np.float32))
    order = g.node("TopK", score, slots, count=2, axis=2, largest=1, sorted=1)[1]
    spare = g.Reshape(g.arange(g.Mul(images, slots)), g.Concat(images, slots, axis=0))
    return Ranked(
        extent=extent,
        valid=valid,
        member=member,
        order=order,
        used=g.Less("keep_slots", g.Unsqueeze("keep", g.const([2]))),
        spare=g.Add(spare, extent),
    )


def _source(g: Body, ranked: Ranked, value: Value) -> Value:
    """[B, N]: text stays itself, the token of a used slot becomes ``value`` [B, M, K], rest -1."""
    text = g.Equal("image_id", g.const(0))
    start = g.Where(text, g.arange(ranked.extent), g.const(-1))
    index = g.Where(ranked.used, ranked.order, ranked.spare)
    return _scatter(g, start, ranked.extent, index, value)


def _scatter(g: Body, start: Value, extent: Value, index: Value, value: Value) -> Value:
    """``start`` [B, N] with ``value`` at ``index`` (both [B, …]); indices from N on are cut off."""
    index, value = g.Flatten(index, axis=1), g.Flatten(value, axis=1)
    data = g.Concat(start, g.Expand(g.const(-1), g.Shape(index)), axis=1)
    data = g.ScatterElements(data, index, value, axis=1)
    return g.Slice(data, g.const([0]), extent, g.const([1]))


def _new_index(g: Body, source: Value) -> Value:
    """[B, N]: index after merging of what stays, -1 otherwise."""
    stays = g.GreaterOrEqual(source, g.const(0))
    count = g.CumSum(g.Cast(stays, to=I64), g.const(1))
    return g.Where(stays, g.Sub(count, g.const(1)), g.const(-1))


def _centres(g: Body, ranked: Ranked) -> tuple[Value, Value, Value, Value]:
    """The last ``recycle`` of those that stay: source and new index [B, N] with rows of their own
    for them; the centres [B, M, R]; which of those there are, bool."""
    recycle = g.Unsqueeze("recycle", g.const([2]))  # [B, M, 1]
    untouched = g.Sub(g.Unsqueeze("keep", g.const([2])), recycle)
    images, count = g.dim("keep", 1), g.dim("recycle_slots", 0)
    first = g.Add(ranked.extent, g.Mul(g.arange(images), count))  # [M]: number of centre 0
    nth = g.Sub("keep_slots", untouched)  # [B, M, K]: which centre a slot is, if not negative
    number = g.Add(g.Unsqueeze(first, g.const([1])), nth)
    is_centre = g.GreaterOrEqual(nth, g.const(0))
    # An unused slot's number may be anything: its scatter lands in a spare column.
    source = _source(g, ranked, g.Where(is_centre, number, ranked.order))
    new_index = _new_index(g, source)

    slot = g.Min(g.Add(untouched, "recycle_slots"), g.Sub(g.dim("keep_slots", 0), g.const(1)))
    centre = g.GatherElements(ranked.order, slot, axis=2)  # [B, M, R]
    return source, new_index, centre, g.Less("recycle_slots", recycle)


def _recycle(g: Body, ranked: Ranked, absorb: int) -> list[Value]:
    source, new_index, centre, real = _centres(g, ranked)
    centre, cosine, pair = _similarity(g, ranked, centre, real, new_index)
    _, mine = _closest(g, cosine, pair)
    limit = g.Min(g.const([absorb]), ranked.extent)
    cosine = g.Where(mine, cosine, g.const(NO_PAIR, np.float32))
    best, taken = g.node("TopK", cosine, limit, count=2, axis=2, largest=1, sorted=1)
    absorbed = g.Greater(best, g.const(NO_PAIR, np.float32))  # [B, C, A]
    centre_column = g.Unsqueeze(centre, g.const([2]))

    # An unused place repeats the centre with weight 0: padding may hold NaN, the centre may not.
    group = g.Concat(centre_column, g.Where(absorbed, taken, centre_column), axis=2)
    always = g.Expand(g.const(True, np.bool_), g.Shape(centre_column))
    inside = g.Concat(always, absorbed, axis=2)  # [B, C, 1 + A]
    weight = g.GatherElements("importance", g.Flatten(group, axis=1), axis=1)
    weight = g.Where(inside, g.Reshape(weight, g.Shape(group)), g.const(0, np.float32))
    weight = _normal(g, weight, g.Cast(inside, to=F32))
    states = g.Cast(_rows(g, "hidden", group), to=F32)  # [B, C, 1 + A, D]
    # Not a MatMul: GPUs round its fp32 operands to TF32.
    mean = g.ReduceSum(g.Mul(states, g.Unsqueeze(weight, g.const([3]))), g.const([2]), keepdims=0)
    touched = g.ReduceMax(g.Cast(absorbed, to=I64), g.const([2]), keepdims=1)
    rows = _with_centres(g, mean, centre, touched)

    target = g.GatherElements(new_index, centre, axis=1)
    target = g.Expand(g.Unsqueeze(target, g.const([2])), g.Shape(taken))
    places = g.Concat(g.dim(taken, 1), g.dim(taken, 2), axis=0)
    spare = g.Reshape(g.arange(g.Mul(g.dim(taken, 1), g.dim(taken, 2))), places)
    index = g.Where(absorbed, taken, g.Add(spare, ranked.extent))
    mapping = _scatter(g, new_index, ranked.extent, index, target)
    return _finish(g, ranked, source, rows, new_index, mapping)


def _illava(g: Body, ranked: Ranked, absorb: int) -> list[Value]:
    source, new_index, centre, real = _centres(g, ranked)
    centre, dot, pair = _products(g, ranked, centre, real, new_index)
    lowest = g.const(LOWEST, np.float32)
    dot = g.Where(pair, dot, lowest)
    limit = g.Min(g.const([absorb]), ranked.extent)
    best, taken = g.node("TopK", dot, limit, count=2, axis=2, largest=1, sorted=1)
    absorbed = g.Greater(best, lowest)  # [B, C, A]
    # An unused place repeats the centre with weight 0: padding may hold NaN, the centre may not.
    group = g.Where(absorbed, taken, g.Unsqueeze(centre, g.const([2])))
    root = g.Sqrt(g.Cast(g.dim("hidden", 2), to=F32))
    weight = g.Softmax(g.Where(absorbed, g.Div(best, root), lowest), axis=2)
    states = g.Cast(_rows(g, "hidden", group), to=F32)  # [B, C, A, D]
    mean = g.ReduceSum(g.Mul(states, g.Unsqueeze(weight, g.const([3]))), g.const([2]), keepdims=0)
    mean = g.Add(g.Cast(_rows(g, "hidden", centre), to=F32), mean)
    touched = g.ReduceMax(g.Cast(absorbed, to=I64), g.const([2]), keepdims=1)
    rows = _with_centres(g, g.Mul(mean, g.const(0.5, np.float32)), centre, touched)

    # Which centre took which token, [B, C, N]; what is unused goes to spare columns.
    places = g.Add(g.arange(g.dim(taken, 2)), ranked.extent)
    size = g.Concat(g.dim(dot, 0), g.dim(dot, 1), g.Add(ranked.extent, limit), axis=0)
    index = g.Where(absorbed, taken, places)
    mine = g.ScatterElements(g.Expand(g.const(0), size), index, g.Cast(absorbed, to=I64), axis=2)
    mine = g.Slice(mine, g.const([0]), ranked.extent, g.const([2]))
    theirs = g.Where(g.Cast(mine, to=onnx.TensorProto.BOOL), dot, lowest)
    owner = g.ArgMax(theirs, axis=1, keepdims=0)  # [B, N]
    moved = g.GatherElements(g.GatherElements(new_index, centre, axis=1), owner, axis=1)
    shared = g.ReduceMax(mine, g.const([1]), keepdims=0)
    mapping = g.Where(g.Cast(shared, to=onnx.TensorProto.BOOL), moved, new_index)
    return _finish(g, ranked, source, rows, new_index, mapping)


def _nearest(g: Body, ranked: Ranked) -> list[Value]:
    source = _source(g, ranked, g.Expand(ranked.spare, g.Shape(ranked.order)))
    new_index = _new_index(g, source)
    centre, cosine, pair = _similarity(g, ranked, ranked.order, ranked.used, new_index)
    owner, mine = _closest(g, cosine, pair)  # [B, 1, N], [B, C, N]

    zero = g.const(0, np.float32)
    weight = g.Where(mine, g.Unsqueeze("importance", g.const([1])), zero)
    own = g.Unsqueeze(g.GatherElements("importance", centre, axis=1), g.const([2]))
    one = g.Expand(g.const(1, np.float32), g.Shape(own))
    share = _normal(  # the centre itself is the last column
        g, g.Concat(weight, own, axis=2), g.Concat(g.Cast(mine, to=F32), one, axis=2)
    )
    minus = g.const([-1])
    theirs = g.Slice(share, g.const([0]), minus, g.const([2]))
    own_share = g.Slice(share, minus, g.const([np.iinfo(np.int64).max]), g.const([2]))
    # Padding may hold NaN, and 0 · NaN would spread through the product.
    valid = g.Unsqueeze(ranked.valid, g.const([2]))
    states = g.Where(valid, g.Cast("hidden", to=F32), zero)
    mean = g.Add(g.MatMul(theirs, states), g.Mul(own_share, _rows(g, states, centre)))
    touched = g.ReduceMax(g.Cast(mine, to=I64), g.const([2]), keepdims=1)
    rows = _with_centres(g, mean, centre, touched)

    owner = g.Squeeze(owner, g.const([1]))  # [B, N]
    moved = g.GatherElements(g.GatherElements(new_index, centre, axis=1), owner, axis=1)
    absorbed = g.ReduceMax(g.Cast(mine, to=I64), g.const([1]), keepdims=0)
    mapping = g.Where(g.Cast(absorbed, to=onnx.TensorProto.BOOL), moved, new_index)
    return _finish(g, ranked, source, rows, new_index, mapping)


def _products(
    g: Body, ranked: Ranked, centre: Value, real: Value, new_index: Value
) -> tuple[Value, Value, Value]:
    """Centres [B, M, C/M] flat as [B, C]; dot products and pairs that may merge [B, C, N]."""
    gone = g.Less(new_index, g.const(0))
    loose = g.Unsqueeze(g.And(ranked.member, g.Unsqueeze(gone, g.const([1]))), g.const([2]))
    pair = g.And(loose, g.Unsqueeze(real, g.const([3])))  # [B, M, C/M, N]
    shape = g.Concat(g.dim("hidden", 0), g.const([-1]), ranked.extent, axis=0)
    pair, centre = g.Reshape(pair, shape), g.Flatten(centre, axis=1)
    states = g.Cast("hidden", to=F32)
    dot = g.MatMul(_rows(g, states, centre), g.Transpose(states, perm=[0, 2, 1]))
    return centre, dot, pair


def _similarity(
    g: Body, ranked: Ranked, centre: Value, real: Value, new_index: Value
) -> tuple[Value, Value, Value]:
    """Similarities as ``_products`` has them, but cosines, NO_PAIR where a pair may not merge."""
    centre, dot, pair = _products(g, ranked, centre, real, new_index)
    norm = g.ReduceL2(g.Cast("hidden", to=F32), g.const([2]), keepdims=0)
    norm = g.Max(norm, g.const(EPSILON, np.float32))  # [B, N]
    cosine = g.Div(dot, g.Unsqueeze(g.GatherElements(norm, centre, axis=1), g.const([2])))
    cosine = g.Div(cosine, g.Unsqueeze(norm, g.const([1])))
    return centre, g.Where(pair, cosine, g.const(NO_PAIR, np.float32)), pair


def _closest(g: Body, cosine: Value, pair: Value) -> tuple[Value, Value]:
    """The centre each token goes to, [B, 1, N]; who owns whom, [B, C, N] bool."""
    owner = g.ArgMax(cosine, axis=1, keepdims=1)
    number = g.Unsqueeze(g.arange(g.dim(cosine, 1)), g.const([1]))
    return owner, g.And(g.Equal(number, owner), pair)


def _normal(g: Body, weight: Value, inside: Value) -> Value:
    """Weights [B, C, n] that sum to 1; equal ones over ``inside`` where they sum to 0."""
    total = g.ReduceSum(weight, g.const([2]), keepdims=1)
    empty = g.Equal(total, g.const(0, np.float32))
    weight = g.Where(empty, inside, weight)
    return g.Div(weight, g.ReduceSum(weight, g.const([2]), keepdims=1))


def _rows(g: Body, data: Value, index: Value) -> Value:
    """``data`` [B, N, D] at ``index`` [B, …] → [B, …, D]."""
    return g.GatherND(data, g.Unsqueeze(index, g.const([-1])), batch_dims=1)


def _with_centres(g: Body, mean: Value, centre: Value, touched: Value) -> Value:
    """[B, N + C, D]: hidden states, then the centres; those that absorbed nothing as they were."""
    touched = g.Cast(touched, to=onnx.TensorProto.BOOL)
    mean = g.Where(touched, g.CastLike(mean, "hidden"), _rows(g, "hidden", centre))
    return g.Concat("hidden", mean, axis=1)


def _finish(
    g: Body,
    ranked: Ranked,
    source: Value,
    rows: Value,
    new_index: Value,
    mapping: Value | None = None,
) -> list[Value]:
    """Gather what stays into its new place."""
    tokens, length = g.arange(ranked.extent), g.dim("out_slots", 0)
    stays = g.GreaterOrEqual(new_index, g.const(0))
    start = g.Expand(g.const(0), g.Concat(g.dim("hidden", 0), g.Add(length, ranked.extent), axis=0))
    index = g.Where(stays, new_index, g.Add(tokens, length))
    origin = g.ScatterElements(start, index, g.Expand(tokens, g.Shape(index)), axis=1)
    origin = g.Slice(origin, g.const([0]), length, g.const([1]))  # [B, Nout]: old index
    count = g.ReduceSum(g.Cast(stays, to=I64), g.const([1]), keepdims=1)
    present = g.Less("out_slots", count)

    picked = g.Max(g.GatherElements(source, origin, axis=1), g.const(0))
    zero = g.CastLike(g.const(0, np.float32), "hidden")
    merged = g.Where(g.Unsqueeze(present, g.const([2])), _rows(g, rows, picked), zero)
    lead = g.Concat(g.Shape("positions", start=0, end=-1), length, axis=0)
    positions = g.GatherElements("positions", g.Expand(origin, lead), axis=-1)
    positions = g.Where(present, positions, g.const(0))
    image_id = g.Where(present, g.GatherElements("image_id", origin, axis=1), g.const(-1))
    return [merged, positions, image_id, mapping or new_index]
