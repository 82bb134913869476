"""Attention over a cache in decode and extend: the standard nodes that belong to one attention."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lvlm.export.ops.op import DOMAIN

# To and from a low-precision cache
CASTS = {("", "Cast"), (DOMAIN, "CacheQuantize"), (DOMAIN, "CacheDequantize")}


@dataclass(frozen=True)
class Site:
    """The nodes of one attention: q, k, v [B,N,H*d] to ``result`` [B,N,Hq*d]."""

    layer: int
    node: ir.Node
    inputs: tuple[ir.Value, ir.Value, ir.Value]
    angles: tuple[ir.Value, ir.Value]  # cos, sin [B,N,d/2]
    writes: tuple[ir.Node, ir.Node]
    result: ir.Value
    heads: int
    kv_heads: int
    width: int  # of a head


def find_site(node: ir.Node) -> Site | None:
    """The attention of decode. None where the attention is of another kind, hides entries that are
    valid (a window), or caps its logits over a cache of 8 bits."""
    if not _masked(node) or not _sees_all_valid(node.inputs[3]):
        return None
    wrote = [producer(before_cast(x), "TensorScatter") for x in node.inputs[1:3]]
    if wrote[0] is None or wrote[1] is None:
        return None
    cache = wrote[0].inputs[0]
    if softcap_of(node) and cache is not None and cache.dtype == ir.DataType.INT8:
        return None  # no function for both
    return _site(node, (wrote[0], wrote[1]))


def find_site_behind(node: ir.Node) -> tuple[Site, ir.Value] | None:
    """The attention of extend: over entries gathered from the cache and the new ones behind them,
    whatever the mask; and the slots of the former. None where the attention is of another kind, or
    caps its logits."""
    if not _masked(node) or softcap_of(node):
        return None
    found = [entries_behind(x) for x in node.inputs[1:3]]
    if found[0] is None or found[1] is None or found[0][1] is not found[1][1]:
        return None
    site = _site(node, (found[0][0], found[1][0]))
    return None if site is None else (site, found[0][1])


def _masked(node: ir.Node) -> bool:
    return node.op_type == "Attention" and node.domain == "" and len(node.inputs) == 4


def softcap_of(node: ir.Node) -> float:
    """The cap of an Attention's logits; 0: none."""
    return float(node.attributes.get_float("softcap", 0.0))


def entries_behind(value: ir.Value | None) -> tuple[ir.Node, ir.Value] | None:
    """The TensorScatter of new entries that ``value`` has behind those of some slots of the same
    cache; and these slots."""
    joined = producer(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or joined.attributes.get_int("axis", 0) != 2:
        return None
    gather = producer(before_cast(joined.inputs[0]), "Gather")
    if gather is None or gather.attributes.get_int("axis", 0) != 2:
        return None
    cache, slots = gather.inputs
    for use in () if cache is None else cache.uses():
        if use.node.op_type == "TensorScatter" and use.idx == 0:
            same = before_cast(use.node.inputs[1]) is joined.inputs[1]
            return (use.node, slots) if same and slots is not None else None
    return None


def _site(node: ir.Node, writes: tuple[ir.Node, ir.Node]) -> Site | None:
    query, key = node.inputs[:2]
    turned, past = producer(query, "RotaryEmbedding"), writes[0].inputs[0]
    turned_key = producer(before_cast(writes[0].inputs[1]), "RotaryEmbedding")
    layer = "" if past is None else str(past.name).removeprefix("past_key_")
    if turned is None or turned_key is None or not layer.isdecimal():
        return None
    cos, sin = turned.inputs[1:3]
    if cos is None or sin is None or (cos, sin) != tuple(turned_key.inputs[1:3]):
        return None
    new = (turned.inputs[0], turned_key.inputs[0], before_cast(writes[1].inputs[1]))
    q, k, v = (_flat(x) for x in new)
    result = _joined(node.outputs[0])
    if q is None or k is None or v is None or result is None:
        return None
    if query is None or key is None or query.shape is None or key.shape is None:
        return None
    heads, size, kv_heads = query.shape[1], query.shape[3], key.shape[1]
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(size, int)):
        return None
    if size % 16 or cos.shape is None or cos.shape[-1] != size // 2:
        return None  # no kernel for such heads
    return Site(int(layer), node, (q, k, v), (cos, sin), writes, result, heads, kv_heads, size)


def _sees_all_valid(mask: ir.Value | None) -> bool:
    """True where a mask is made of one comparison: slots before the number of valid ones."""
    while (node := producer(mask, "Unsqueeze") or producer(mask, "Slice")) is not None:
        mask = node.inputs[0]
    return producer(mask, "Less") is not None


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that gives ``value``, where it is the standard op ``op_type``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def before_cast(value: ir.Value | None) -> ir.Value | None:
    """The value before a cast to or from the type of a low-precision cache; without one ``value``
    itself."""
    while value is not None and (node := value.producer()) is not None:
        if (node.domain, node.op_type) not in CASTS:
            break
        value = node.inputs[0]
    return value


def _flat(value: ir.Value | None) -> ir.Value | None:
    """[B,N,H*d] that became the heads [B,H,N,d] of ``value``."""
    transpose = producer(value, "Transpose")
    if transpose is None or list(transpose.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return None
    reshape = producer(transpose.inputs[0], "Reshape")
    return None if reshape is None else reshape.inputs[0]


def _joined(value: ir.Value) -> ir.Value | None:
    """[B,N,H*d] that the heads [B,H,N,d] of ``value`` become; None if they are used otherwise."""
    for op_type in ("Transpose", "Reshape"):
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type != op_type:
            return None
        value = uses[0].node.outputs[0]
    return value
