"""Causal attention as ``lvlm::CacheAttention``, the plugin that reads valid entries only; that of a
prompt whose CacheImportance is beside it as ``lvlm::ScoredAttention``, one plugin for both.

Three kinds are found in a graph: decode, one row over a cache under a mask of its valid slots;
extend, new rows over gathered entries and themselves, which then attend to the cache that they are
written into, without the copy; prefill, a prompt over itself. Masks that say anything else (entries
that leave one by one, tokens of an image that see one another) stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lvlm.export.ops import cache_importance, scored_attention
from lvlm.export.ops.cache_attention import HEAD_MULTIPLE, LARGEST_HEAD, SCHEMA
from lvlm.export.ops.op import DOMAIN, VERSION
from lvlm.export.targets.passes.attention_sites import entries_behind, producer
from lvlm.export.targets.passes.graph_edits import DTYPES, constant
from lvlm.export.targets.passes.ort_fusions import take_place

SHAPED = ("Unsqueeze", "Slice", "Expand", "Reshape", "Cast")


@dataclass(frozen=True)
class CausalSite:
    """An attention in which every row sees one key more than the row before.

    key, value  what it goes over: a cache [B,Hkv,C,d], or a prompt's own
    past        [B] int64, keys before the first row's own; None: none, it is a prompt
    plus        how many keys the first row sees beyond these
    most        [P], what there is at most of ``past``; None: all
    window      of the keys that a row sees, the last so many; 0: all
    """

    key: ir.Value
    value: ir.Value
    past: ir.Value | None = None
    plus: int = 1
    most: ir.Value | None = None
    window: int = 0


def use_cache_attention(model: ir.Model, kept: Collection[str] = (), *, cache: bool = True) -> int:
    """Use it for causal attention in data types that are not ``kept`` and, with ``cache``, for all
    over a cache; how often. Heads that no kernel is for stay as they are."""
    counts: dict[object, ir.Value] = {}
    done = 0
    for node in list(model.graph):
        if node.op_type != "Attention" or node.domain != "" or not _heads_fit(node):
            continue
        site = _decode(node) or _extend(node) or _prompt(node)
        query = node.inputs[0]
        if site is None or query is None or query.dtype is None:
            continue
        if DTYPES[query.dtype] in kept and not (cache and site.past is not None):
            continue
        if (scores := _scores(node)) is not None and site.past is None and not site.window:
            _replace_scored(model, node, scores)
            done += 1
            continue
        key = (site.past, site.plus, site.most)
        if key not in counts:
            counts[key] = _count(model, node, query, site, f"keys_seen_{len(counts)}")
        _replace(model, node, site, counts[key])
        done += 1
    if done:
        model.opset_imports[DOMAIN] = VERSION
        common.RemoveUnusedNodesPass()(model)  # masks, and copies of entries
    return done


def _heads_fit(node: ir.Node) -> bool:
    query, key = node.inputs[:2]
    if query is None or key is None or query.shape is None or key.shape is None:
        return False
    if set(node.attributes) - {"is_causal", "scale"} or len(node.outputs) > 1:
        return False
    heads, key_heads, width = query.shape[1], key.shape[1], query.shape[3]
    if not (isinstance(heads, int) and isinstance(key_heads, int) and isinstance(width, int)):
        return False
    return heads % key_heads == 0 and width % HEAD_MULTIPLE == 0 and width <= LARGEST_HEAD


def _decode(node: ir.Node) -> CausalSite | None:
    """One row over slots before the number of valid ones and, with a window, not far before."""
    query, key, value = node.inputs[:3]
    assert query is not None
    if len(node.inputs) != 4 or query.shape is None or query.shape[2] != 1:
        return None
    if key is None or value is None or producer(key, "TensorScatter") is None:
        return None
    near, window = _without_window(_condition(node.inputs[3]), _window_before)
    if near is None or near.op_type != "Less" or window is None:
        return None
    valid = _stripped(near.inputs[1])
    return None if valid is None else CausalSite(key, value, valid, 0, window=window)


def _extend(node: ir.Node) -> CausalSite | None:
    """Rows over entries of a cache and themselves, with a mask for each beside the other."""
    if len(node.inputs) != 4:
        return None
    joined = _condition(node.inputs[3])
    if joined is None or joined.op_type != "Concat" or len(joined.inputs) != 2:
        return None
    past, window = _without_window(_condition(joined.inputs[0]), _distance)
    if past is None or past.op_type != "Less" or window is None:
        return None
    if window != _own_window(_condition(joined.inputs[1])):
        return None
    slots, index = (_stripped(value) for value in past.inputs)
    key, value = (entries_behind(joined) for joined in node.inputs[1:3])
    if key is None or value is None:
        return None
    if any((_stripped(at), to.inputs[2]) != (slots, index) for to, at in (key, value)):
        return None
    return CausalSite(key[0].outputs[0], value[0].outputs[0], index, 1, slots, window)


def _prompt(node: ir.Node) -> CausalSite | None:
    """A prompt over itself, without a mask or with that of a window."""
    key, value = node.inputs[1:3]
    if key is None or value is None:
        return None
    if node.attributes.get_int("is_causal", 0) == 1 and len(node.inputs) == 3:
        return CausalSite(key, value)
    window = _own_window(_condition(node.inputs[3])) if len(node.inputs) == 4 else None
    return None if window is None else CausalSite(key, value, window=window)


def _own_window(node: ir.Node | None) -> int | None:
    """The window in a mask of rows over themselves: 0 where each sees all up to itself, w where it
    sees the last w of these; None: another mask."""
    node, window = _without_window(node, _distance)
    if node is None or node.op_type != "GreaterOrEqual" or _number(node.inputs[1]) != 0:
        return None
    return None if producer(node.inputs[0], "Sub") is None else window


def _without_window(
    node: ir.Node | None, window: Callable[[ir.Node], int | None]
) -> tuple[ir.Node | None, int | None]:
    """A condition without that of a window, and the window: 0 without one, None: another."""
    if node is None or node.op_type != "And":
        return node, 0
    rest, own = (_condition(value) for value in node.inputs)
    return rest, None if own is None else window(own)


def _distance(node: ir.Node) -> int | None:
    """w of a comparison ``place - slot < w``."""
    less = node.op_type == "Less" and producer(_stripped(node.inputs[0]), "Sub") is not None
    return _number(node.inputs[1]) if less else None


def _window_before(node: ir.Node) -> int | None:
    """w of a comparison ``slot >= valid - w``."""
    if node.op_type != "GreaterOrEqual":
        return None
    sub = producer(_stripped(node.inputs[1]), "Sub")
    return None if sub is None else _number(sub.inputs[1])


def _condition(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a mask, before it is shaped."""
    stripped = _stripped(value)
    return None if stripped is None else stripped.producer()


def _stripped(value: ir.Value | None) -> ir.Value | None:
    """``value`` before ops that give it other axes or another integer type; slices here are of all
    that there is."""
    while value is not None and (node := value.producer()) is not None:
        if node.domain != "" or node.op_type not in SHAPED:
            break
        value = node.inputs[0]
    return value


def _number(value: ir.Value | None) -> int | None:
    array = None if value is None else ir.convenience.get_const_tensor(value)
    return int(array.numpy().item()) if array is not None and array.size == 1 else None


def _count(
    model: ir.Model, node: ir.Node, query: ir.Value, site: CausalSite, name: str
) -> ir.Value:
    """[B] int64, the keys that the first row sees."""
    nodes: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        nodes.append(ir.node(op, inputs, attributes=attributes))
        made = nodes[-1].outputs[0]
        made.name, made.dtype = f"{name}_{len(nodes)}", ir.DataType.INT64
        return made

    def number(n: int) -> ir.Value:
        return constant(model, f"keys_{n}", np.array([n], np.int64))

    if site.past is None:
        counted = add("Expand", number(1), add("Shape", query, start=0, end=1))
    else:
        counted = site.past
        if site.most is not None:
            counted = add("Min", counted, add("Shape", site.most))
        if site.plus:
            counted = add("Add", counted, number(site.plus))
    model.graph.insert_before(node, nodes)
    return counted


def _scores(node: ir.Node) -> ir.Node | None:
    """The CacheImportance of the same queries and keys, each query seeing what it does here."""
    query, key = node.inputs[:2]
    for use in () if query is None else query.uses():
        other = use.node
        if other.op_type == cache_importance.SCHEMA.name and other.inputs[:2] == (query, key):
            slots = producer(other.inputs[2], "Expand")
            if slots is not None and producer(slots.inputs[0], "Range") is not None:
                return other
    return None


def _replace_scored(model: ir.Model, node: ir.Node, scores: ir.Node) -> None:
    new = ir.node(
        scored_attention.SCHEMA.name,
        [*node.inputs[:3], *scores.inputs[2:4]],
        attributes={"scale": scores.attributes["scale"].as_float()},
        domain=DOMAIN,
        name=node.name,
        num_outputs=2,
    )
    # Behind the later one of the two: the lengths are computed before the scores
    model.graph.insert_after(scores, [new])
    for old, made in zip((node, scores), new.outputs, strict=True):
        take_place(old.outputs[0], made)
        model.graph.remove(old, safe=True)


def _replace(model: ir.Model, node: ir.Node, site: CausalSite, seen: ir.Value) -> None:
    query = node.inputs[0]
    assert query is not None
    assert query.shape is not None
    width = query.shape[3]
    assert isinstance(width, int)
    scale = node.attributes.get_float("scale", width**-0.5)
    new = ir.node(
        SCHEMA.name,
        [query, site.key, site.value, seen],
        attributes={"scale": scale, "window": site.window},
        domain=DOMAIN,
        name=node.name,
    )
    model.graph.insert_before(node, [new])
    take_place(node.outputs[0], new.outputs[0])
    model.graph.remove(node, safe=True)
