"""Attention over a cache as ONNX Runtime's GroupQueryAttention: rotary embedding, cache write and
attention in one node, which reads the valid part of the cache only.

It appends: the new entry goes to slot valid_length - 1. A graph that says of itself that it writes
there, and nowhere else, can use it (``CACHE_WRITES``); another keeps TensorScatter and Attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from lvlm.export.targets._base import AT_THE_END, CACHE_WRITES, POSITIONS
from lvlm.export.targets._ort_fusions import MICROSOFT, take_place
from lvlm.export.targets._passes import DTYPES


@dataclass(frozen=True)
class Site:
    """The nodes of one decode attention: q, k, v [B,1,H*d] to ``result`` [B,1,Hq*d]."""

    layer: int
    node: ir.Node
    inputs: tuple[ir.Value, ir.Value, ir.Value]
    angles: tuple[ir.Value, ir.Value]  # cos, sin [B,1,d/2]
    writes: tuple[ir.Node, ir.Node]
    result: ir.Value
    heads: int
    kv_heads: int


def group_attention(model: ir.Model) -> int:
    """Use GroupQueryAttention for masked Attention over what TensorScatter wrote; how often."""
    inputs = {value.name: value for value in model.graph.inputs}
    sites = [site for node in model.graph if (site := _site(node)) is not None]
    if not sites or model.metadata_props.get(CACHE_WRITES) != AT_THE_END:
        return 0
    first, positions = model.graph[0], int(model.metadata_props[POSITIONS])
    lengths = _lengths(model, first, inputs["valid_length"])
    tables: dict[tuple[ir.Value, ir.Value], list[ir.Value]] = {}
    for site in sites:
        if site.angles not in tables:
            tables[site.angles] = _tables(model, site.angles, inputs["position_ids"], positions)
        last, total = (_row(model, first, x, site.layer) for x in lengths)
        _group(model, site, last, total, tables[site.angles], inputs["position_ids"])
    return len(sites)


def _site(node: ir.Node) -> Site | None:
    """None where the attention is of another kind."""
    if node.op_type != "Attention" or node.domain != "" or len(node.inputs) != 4:
        return None
    query, key, value = node.inputs[:3]
    turned = _producer(query, "RotaryEmbedding")
    wrote = [_producer(_before_cast(x), "TensorScatter") for x in (key, value)]
    if turned is None or wrote[0] is None or wrote[1] is None:
        return None
    writes, past = (wrote[0], wrote[1]), wrote[0].inputs[0]
    turned_key = _producer(_before_cast(writes[0].inputs[1]), "RotaryEmbedding")
    layer = "" if past is None else str(past.name).removeprefix("past_key_")
    if turned_key is None or not layer.isdecimal():
        return None
    cos, sin = turned.inputs[1:3]
    if cos is None or sin is None or (cos, sin) != tuple(turned_key.inputs[1:3]):
        return None
    new = (turned.inputs[0], turned_key.inputs[0], _before_cast(writes[1].inputs[1]))
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
    return Site(int(layer), node, (q, k, v), (cos, sin), writes, result, heads, kv_heads)


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _before_cast(value: ir.Value | None) -> ir.Value | None:
    """What was cast to or from the type of a narrower cache; without a Cast ``value`` itself."""
    cast = _producer(value, "Cast")
    return value if cast is None else cast.inputs[0]


def _flat(value: ir.Value | None) -> ir.Value | None:
    """[B,N,H*d] that became the heads [B,H,N,d] of ``value``."""
    transpose = _producer(value, "Transpose")
    if transpose is None or list(transpose.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return None
    reshape = _producer(transpose.inputs[0], "Reshape")
    return None if reshape is None else reshape.inputs[0]


def _joined(value: ir.Value) -> ir.Value | None:
    """[B,N,H*d] that the heads [B,H,N,d] of ``value`` become; None if they are used otherwise."""
    for op_type in ("Transpose", "Reshape"):
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type != op_type:
            return None
        value = uses[0].node.outputs[0]
    return value


def _lengths(model: ir.Model, before: ir.Node, valid: ir.Value) -> tuple[ir.Value, ir.Value]:
    """int32: the slot [L,B] of each row's newest entry, and the longest row [L] of each layer."""
    one = _constant(model, "one_entry", np.array(1, np.int64))
    axis = _constant(model, "row_axis", np.array([1], np.int64))
    last = ir.node("Sub", [valid, one])
    narrow = ir.node("Cast", [last.outputs[0]], attributes={"to": int(ir.DataType.INT32)})
    longest = ir.node("ReduceMax", [valid, axis], attributes={"keepdims": 0})
    total = ir.node("Cast", [longest.outputs[0]], attributes={"to": int(ir.DataType.INT32)})
    for node, name in ((last, "last_slot"), (narrow, "last_slots"), (longest, "longest"),
                       (total, "longest_rows")):  # fmt: skip
        node.outputs[0].name = name
    model.graph.insert_before(before, [last, narrow, longest, total])
    return narrow.outputs[0], total.outputs[0]


def _row(model: ir.Model, before: ir.Node, table: ir.Value, layer: int) -> ir.Value:
    index = _constant(model, f"layer_{layer}", np.array(layer, np.int64))
    node = ir.node("Gather", [table, index], attributes={"axis": 0})
    node.outputs[0].name = f"{table.name}_{layer}"
    model.graph.insert_before(before, node)
    return node.outputs[0]


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """An initializer, made once."""
    known = model.graph.initializers
    if name not in known:
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        known[name] = value
    return known[name]


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
    for node in ordered:
        del node.metadata_props[:]
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
        _constant(model, f"{name}_of_positions", np.ascontiguousarray(x[0]))
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
    assert key is not None
    assert key.dtype is not None
    given = [*_packed(site.inputs), key, value, last, total, *tables, position_ids]
    # The kernel takes one type for everything: a narrower cache's.
    given = [None if x is None else _cast(model, site.node, x, key.dtype) for x in given]
    node = ir.node(
        "GroupQueryAttention",
        given,
        attributes={
            "num_heads": site.heads,
            "kv_num_heads": site.kv_heads,
            "scale": site.node.attributes["scale"].as_float(),
            "do_rotary": 1,
        },
        domain=MICROSOFT,
        num_outputs=3,
    )
    model.graph.insert_before(site.node, node)
    result = node.outputs[0]
    result.type = key.type
    take_place(site.result, _cast(model, site.node, result, site.result.dtype))
    for write, output in zip(site.writes, node.outputs[1:], strict=True):
        take_place(write.outputs[0], output)


def _cast(model: ir.Model, before: ir.Node, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """A float ``value`` as ``dtype``, another as it is."""
    if dtype is None or value.dtype == dtype or value.dtype not in DTYPES:
        return value
    name = f"{value.name}_{dtype.name.lower()}"
    if value.is_initializer() and value.const_value is not None:
        return _constant(model, name, value.const_value.numpy().astype(dtype.numpy()))
    node = ir.node("Cast", [value], attributes={"to": int(dtype)})
    node.outputs[0].name, node.outputs[0].shape = name, value.shape
    node.outputs[0].type = ir.TensorType(dtype)
    model.graph.insert_before(before, node)
    return node.outputs[0]


def _packed(inputs: tuple[ir.Value, ir.Value, ir.Value]) -> list[ir.Value | None]:
    """One input where query, key and value are parts of one product."""
    split = inputs[0].producer()
    if split is not None and split.op_type == "Split" and tuple(split.outputs) == inputs:
        return [split.inputs[0], None, None]
    return list(inputs)
