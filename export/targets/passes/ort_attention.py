"""Attention over a cache as ONNX Runtime's GroupQueryAttention: rotary embedding, cache write and
attention in one node, which reads the valid part of the cache only.

It appends: the new entry goes to slot valid_length - 1. Where a graph says of itself that it writes
there, and nowhere else (``CACHE_WRITES``), the node does all of it. Where it may overwrite a victim
anywhere, TensorScatter still writes, and the node appends what lies in the last slot once more.

Each is a function of that one node, so that a kernel of our own can take its place. Of a cache in 8
bits the functions are others (ort_int8_cache.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper
from onnx.reference import ReferenceEvaluator

from lvlm.export.ops.op import OPSET
from lvlm.export.targets.description import AT_THE_END, CACHE_WRITES, POSITIONS
from lvlm.export.targets.passes import ort_int8_cache
from lvlm.export.targets.passes.attention_sites import Site, find_site, softcap_of
from lvlm.export.targets.passes.graph_edits import DTYPES, LOWERED_DOMAIN, constant
from lvlm.export.targets.passes.ort_fusions import MICROSOFT, take_place
from lvlm.runtime.backends.ort.sessions import AGAIN

# Functions, and their inputs. Appended: rotary embedding, write to slot ``last``, attention;
# written: attention over what is there already; read: the same of 8 bits, which gives no cache.
# ``last`` [B] and ``longest`` are int32.
APPENDED, WRITTEN, READ = "AppendedAttention", "WrittenAttention", "ReadAttention"
CACHE = ["past_key", "past_value", "last", "longest"]
FUNCTIONS = {
    APPENDED: ["qkv", *CACHE, "cos", "sin", "position_ids"],
    WRITTEN: ["query", "key", "value", *CACHE],
    READ: ["query", "key", "value", "last", "longest"],
}
OUTPUTS = ["output", "present_key", "present_value"]
CAPPED = "Capped"  # before the name where logits are capped, which no kernel of our own does


def group_attention(model: ir.Model) -> int:
    """Use it for masked Attention over what TensorScatter wrote; how often."""
    inputs = {value.name: value for value in model.graph.inputs}
    sites = [site for node in model.graph if (site := find_site(node)) is not None]
    if not sites:
        return 0
    first = model.graph[0]
    slot, *lengths = _lengths(model, first, inputs["valid_length"])
    if model.metadata_props.get(CACHE_WRITES) != AT_THE_END:
        given = (*lengths, _slots(model, first, slot, sites[0].kv_heads))
        for site in sites:
            _group_again(model, site, *(_row(model, first, x, site.layer) for x in given))
        return len(sites)
    positions = int(model.metadata_props[POSITIONS])
    tables: dict[tuple[ir.Value, ir.Value], list[ir.Value]] = {}
    for site in sites:
        if site.angles not in tables:
            tables[site.angles] = _tables(model, site.angles, inputs["position_ids"], positions)
        last, total = (_row(model, first, x, site.layer) for x in lengths)
        _group(model, site, last, total, tables[site.angles], inputs["position_ids"])
    return len(sites)


def _lengths(model: ir.Model, before: ir.Node, valid: ir.Value) -> tuple[ir.Value, ...]:
    """Each row's newest slot [L,B], int64 and int32, and the longest row [L], int32."""
    one = constant(model, "one_entry", np.array(1, np.int64))
    axis = constant(model, "row_axis", np.array([1], np.int64))
    last = ir.node("Sub", [valid, one])
    last_int32 = ir.node("Cast", [last.outputs[0]], attributes={"to": int(ir.DataType.INT32)})
    longest = ir.node("ReduceMax", [valid, axis], attributes={"keepdims": 0})
    total = ir.node("Cast", [longest.outputs[0]], attributes={"to": int(ir.DataType.INT32)})
    for node, name in ((last, "last_slot"), (last_int32, "last_slots"), (longest, "longest"),
                       (total, "longest_rows")):  # fmt: skip
        node.outputs[0].name = name
    model.graph.insert_before(before, [last, last_int32, longest, total])
    return last.outputs[0], last_int32.outputs[0], total.outputs[0]


def _slots(model: ir.Model, before: ir.Node, last: ir.Value, heads: int) -> ir.Value:
    """int64 [L,B,H,2]: head and newest slot, as GatherND reads them of a cache [B,H,C,d]."""
    axes = constant(model, "slot_axes", np.array([2, 3], np.int64))
    ones = constant(model, "each_head", np.ones((1, 1, heads, 1), np.int64))
    numbers = constant(model, "head_numbers", np.arange(heads)[None, None, :, None])
    zero = constant(model, "no_slot", np.array(0, np.int64))
    unsqueezed = ir.node("Unsqueeze", [last, axes])
    slots = ir.node("Mul", [unsqueezed.outputs[0], ones])
    none = ir.node("Mul", [slots.outputs[0], zero])
    head = ir.node("Add", [none.outputs[0], numbers])
    pairs = ir.node("Concat", [head.outputs[0], slots.outputs[0]], attributes={"axis": -1})
    nodes = [unsqueezed, slots, none, head, pairs]
    for node in nodes:
        node.outputs[0].name = f"newest_{node.op_type}_{nodes.index(node)}"
    model.graph.insert_before(before, nodes)
    return pairs.outputs[0]


def _row(model: ir.Model, before: ir.Node, table: ir.Value, layer: int) -> ir.Value:
    index = constant(model, f"layer_{layer}", np.array(layer, np.int64))
    node = ir.node("Gather", [table, index], attributes={"axis": 0})
    node.outputs[0].name = f"{table.name}_{layer}"
    model.graph.insert_before(before, node)
    return node.outputs[0]


def _tables(
    model: ir.Model, angles: tuple[ir.Value, ir.Value], position_ids: ir.Value, positions: int
) -> list[ir.Value]:
    """cos and sin [positions, d/2], computed by the graph's own nodes for every position."""
    nodes: dict[ir.Node, None] = {}
    constants: dict[str, np.ndarray] = {}
    waiting = [*angles]
    while waiting:
        value = waiting.pop()
        if value is position_ids:
            continue
        producer = value.producer()
        if producer is not None:
            nodes[producer] = None
            waiting += [x for x in producer.inputs if x is not None]
        elif value.const_value is not None:
            constants[str(value.name)] = value.const_value.numpy()
        else:
            raise AssertionError(f"rotary angles are computed from {value.name}")
    ordered = [ir.to_proto(node) for node in model.graph if node in nodes]
    info = onnx.helper.make_tensor_value_info
    outs = [str(angle.name) for angle in angles]
    graph = onnx.helper.make_graph(
        ordered,
        "angles",
        [info(str(position_ids.name), onnx.TensorProto.INT64, [1, positions])],
        [info(name, int(angle.dtype or 0), None) for name, angle in zip(outs, angles, strict=True)],
        [onnx.numpy_helper.from_array(x, name) for name, x in constants.items()],
    )
    opsets = [onnx.helper.make_opsetid("", model.opset_imports[""])]
    found = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets)).run(
        None, {str(position_ids.name): np.arange(positions)[None]}
    )
    return [
        constant(model, f"{name}_of_positions", np.ascontiguousarray(x[0]))
        for name, x in zip(outs, found, strict=True)
    ]


def _group(
    model: ir.Model,
    site: Site,
    last: ir.Value,
    total: ir.Value,
    tables: list[ir.Value],
    position_ids: ir.Value,
) -> None:
    key, value = (write.inputs[0] for write in site.writes)
    given = [packed(model, site), key, value, last, total, *tables, position_ids]
    node = _node(model, site, given, APPENDED)
    for write, output in zip(site.writes, node.outputs[1:], strict=True):
        take_place(write.outputs[0], output)


def _group_again(
    model: ir.Model, site: Site, last: ir.Value, total: ir.Value, slot: ir.Value
) -> None:
    """TensorScatter has written anywhere: what lies in the last slot is appended there again.

    The cache that the node gives is an output of its own, so that it can be bound to the same
    memory: else the node copies the whole cache first.
    """
    query = site.node.inputs[0]
    assert query is not None
    caches = [write.outputs[0] for write in site.writes]
    if caches[0].dtype == ir.DataType.INT8:
        _node(model, site, [_rows(model, site.node, query), *caches, last, total], READ)
        return
    newest = []
    for cache in caches:
        entry = ir.node("GatherND", [cache, slot], attributes={"batch_dims": 1})
        entry.outputs[0].name = f"{cache.name}_last"
        entry.outputs[0].type = cache.type
        model.graph.insert_before(site.node, entry)
        newest.append(_rows(model, site.node, entry.outputs[0]))
    given = [_rows(model, site.node, query), *newest, *caches, last, total]
    node = _node(model, site, given, WRITTEN)
    for cache, output in zip(caches, node.outputs[1:], strict=True):
        output.name, output.shape, output.type = f"{cache.name}{AGAIN}", cache.shape, cache.type
        model.graph.outputs.append(output)


def _node(model: ir.Model, site: Site, given: Sequence[ir.Value | None], name: str) -> ir.Node:
    """The attention in the place of ``site``'s; its outputs 1 and 2 are the cache."""
    cache = site.writes[0].inputs[0]
    assert cache is not None
    assert cache.dtype is not None
    softcap, held = softcap_of(site.node), cache.dtype == ir.DataType.INT8
    function = ir.serde.deserialize_function(cached_attention(name, int8=held, capped=softcap != 0))
    model.functions.setdefault(function.identifier(), function)
    model.opset_imports[LOWERED_DOMAIN] = 1
    node = ir.node(
        function.name,
        # GroupQueryAttention takes one type for everything: that of a low-precision cache.
        [x if x is None or held else _cast(model, site.node, x, cache.dtype) for x in given],
        attributes={
            "num_heads": site.heads,
            "kv_num_heads": site.kv_heads,
            "scale": site.node.attributes["scale"].as_float(),
            **({"softcap": softcap} if softcap else {}),
        },
        domain=LOWERED_DOMAIN,
        num_outputs=1 if name == READ else 3,
    )
    model.graph.insert_before(site.node, node)
    result = node.outputs[0]
    result.type = site.result.type if held else cache.type
    for output in node.outputs:
        output.name = f"attention_{site.layer}_{output.index()}"
    take_place(site.result, _cast(model, site.node, result, site.result.dtype))
    return node


def _rows(model: ir.Model, before: ir.Node, value: ir.Value) -> ir.Value:
    """[B,1,H*d] of [B,H,1,d] or [B,H,d]."""
    sizes = constant(model, "one_row", np.array([0, 1, -1], np.int64))
    node = ir.node("Reshape", [value, sizes])
    node.outputs[0].name, node.outputs[0].type = f"{value.name}_row", value.type
    model.graph.insert_before(before, node)
    return node.outputs[0]


def _cast(model: ir.Model, before: ir.Node, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """A float ``value`` as ``dtype``, another as it is."""
    if dtype is None or value.dtype == dtype or value.dtype not in DTYPES:
        return value
    name = f"{value.name}_{dtype.name.lower()}"
    if value.is_initializer() and value.const_value is not None:
        return constant(model, name, value.const_value.numpy().astype(dtype.numpy()))
    node = ir.node("Cast", [value], attributes={"to": int(dtype)})
    node.outputs[0].name, node.outputs[0].shape = name, value.shape
    node.outputs[0].type = ir.TensorType(dtype)
    model.graph.insert_before(before, node)
    return node.outputs[0]


def packed(model: ir.Model, site: Site) -> ir.Value:
    """Query, key and value beside each other: the product that they are parts of, if they are."""
    split = site.inputs[0].producer()
    if split is not None and split.op_type == "Split" and tuple(split.outputs) == site.inputs:
        assert split.inputs[0] is not None
        return split.inputs[0]
    joined = ir.node("Concat", list(site.inputs), attributes={"axis": -1})
    joined.outputs[0].name, joined.outputs[0].type = f"packed_{site.layer}", site.inputs[0].type
    model.graph.insert_before(site.node, joined)
    return joined.outputs[0]


def cached_attention(name: str, *, int8: bool = False, capped: bool = False) -> onnx.FunctionProto:
    """GroupQueryAttention with the given inputs, or standard nodes over a cache of 8 bits; its
    heads and scale are the node's, and its cap of logits, if ``capped``."""
    inputs, outputs = FUNCTIONS[name], OUTPUTS[:1] if name == READ else OUTPUTS
    if int8:
        build = ort_int8_cache.read if name == READ else ort_int8_cache.appended
        return build(name, inputs, outputs)
    given = inputs if name == WRITTEN else [inputs[0], "", "", *inputs[1:]]
    node = helper.make_node(
        *("GroupQueryAttention", given, outputs),
        domain=MICROSOFT,
        do_rotary=int(name == APPENDED),
    )
    kinds = {
        "num_heads": onnx.AttributeProto.INT,
        "kv_num_heads": onnx.AttributeProto.INT,
        "scale": onnx.AttributeProto.FLOAT,
        **({"softcap": onnx.AttributeProto.FLOAT} if capped else {}),
    }
    for attribute, kind in kinds.items():
        reference = onnx.AttributeProto(name=attribute, ref_attr_name=attribute, type=kind)  # type: ignore[arg-type]
        node.attribute.append(reference)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    name = f"{CAPPED}{name}" if capped else name
    return helper.make_function(
        LOWERED_DOMAIN, name, inputs, outputs, [node], opsets, attributes=list(kinds)
    )
