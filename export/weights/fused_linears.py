"""Products that read the same input become one, their weights stored side by side, then a Split.

Query, key and value; gate and up: one larger product costs less than two or three on every
engine, most of all for the single rows of decode. A graph pass over traced graphs: it knows no
model, only MatMul nodes, with or without a bias, whose weights are the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lvlm.export.graphs.tracing import TracedGraph


@dataclass(frozen=True)
class Product:
    """x @ weight, or x @ weight + bias; ``result`` is the last of its nodes."""

    node: ir.Node
    weight: str
    bias: str | None
    result: ir.Node


def fuse_linears(graphs: Sequence[TracedGraph]) -> dict[str, tuple[str, ...]]:
    """Fuse products in all ``graphs`` alike; the parameters that each new tensor is made of.

    A parameter is stored once, so only what every graph uses in the same company is fused.
    Precondition: weights lie as MatMul takes them, [K,N].
    """
    groups = [_groups(graph) for graph in graphs]
    together: dict[str, set[tuple[str, ...] | None]] = {}
    for graph, found in zip(graphs, groups, strict=True):
        company = {p: names for members in found for names in _names(members) for p in names}
        for parameter in graph.parameters:
            together.setdefault(parameter, set()).add(company.get(parameter))
    parts: dict[str, tuple[str, ...]] = {}
    for graph, found in zip(graphs, groups, strict=True):
        for members in found:
            names = _names(members)
            if all(together[p] == {group} for group in names for p in group):
                parts |= _fuse(graph, members)
    return parts


def _names(members: Sequence[Product]) -> list[tuple[str, ...]]:
    """The members' weights and, where there are, their biases."""
    return [
        tuple(m.weight for m in members),
        *([tuple(m.bias or "" for m in members)] if members[0].bias is not None else []),
    ]


def _groups(graph: TracedGraph) -> list[list[Product]]:
    """Two and more products of one input, in the graph's order."""
    readers: dict[tuple[int, bool], list[Product]] = {}
    for node in graph.model.graph:
        product = _product(graph, node)
        if product is not None:
            readers.setdefault((id(node.inputs[0]), product.bias is None), []).append(product)
    return [members for members in readers.values() if len(members) > 1]


def _product(graph: TracedGraph, node: ir.Node) -> Product | None:
    weight = _parameter(graph, node.inputs[1]) if node.op_type == "MatMul" else None
    if weight is None or node.domain != "" or len(graph.parameters[weight].shape or ()) != 2:
        return None
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and not node.outputs[0].is_graph_output():
        add = uses[0].node
        bias = _parameter(graph, add.inputs[1 - uses[0].idx])
        if bias is not None and len(graph.parameters[bias].shape or ()) == 1:
            return Product(node, weight, bias, add)
    return Product(node, weight, None, node)


def _parameter(graph: TracedGraph, value: ir.Value | None) -> str | None:
    """The name of a parameter that only one node reads."""
    name = None if value is None else value.name
    known = name in graph.parameters and graph.parameters[name] is value
    return name if known and value is not None and len(list(value.uses())) == 1 else None


def _fuse(graph: TracedGraph, members: Sequence[Product]) -> dict[str, tuple[str, ...]]:
    """One product in the members' place; the parameters that its new ones are made of."""
    weights = [graph.parameters[m.weight] for m in members]
    widths = [_width(value) for value in weights]
    parts = {joined_name(names): names for names in _names(members)}
    fused = [_side_by_side(graph, name, names) for name, names in parts.items()]
    first = members[0]
    name = "_".join(str(m.result.outputs[0].name) for m in members)
    nodes = [ir.node("MatMul", [first.node.inputs[0], fused[0]])]
    if first.bias is not None:
        nodes.append(ir.node("Add", [nodes[0].outputs[0], fused[1]]))
    sizes = ir.node("Constant", [], attributes={"value_ints": widths})
    split = ir.node(
        "Split",
        [nodes[-1].outputs[0], sizes.outputs[0]],
        attributes={"axis": -1},
        num_outputs=len(members),
    )
    sizes.outputs[0].name = f"{name}_sizes"
    for node in nodes:
        wide, narrow = node.outputs[0], first.result.outputs[0]
        wide.name = f"{name}_{node.op_type.lower()}"
        wide.type = narrow.type
        wide.shape = ir.Shape([*(narrow.shape or ())[:-1], sum(widths)])
    graph.model.graph.insert_before(first.node, [*nodes, sizes, split])
    for member, output in zip(members, split.outputs, strict=True):
        old = member.result.outputs[0]
        output.shape, output.type = old.shape, old.type
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        output.name, old.name = old.name, f"{old.name}_replaced"
        for node in dict.fromkeys((member.result, member.node)):
            graph.model.graph.remove(node, safe=True)
    for names in parts.values():
        for old_name in names:
            del graph.parameters[old_name]
            del graph.model.graph.initializers[old_name]
    return parts


def _width(value: ir.Value) -> int:
    assert value.shape is not None
    width = value.shape[-1]
    assert isinstance(width, int)
    return width


def _side_by_side(graph: TracedGraph, name: str, names: Sequence[str]) -> ir.Value:
    """A new parameter as wide as all of ``names``."""
    old = [graph.parameters[n] for n in names]
    value = ir.Value(name=name, type=old[0].type)
    value.shape = ir.Shape([*(old[0].shape or ())[:-1], sum(map(_width, old))])
    value.const_value = old[0].const_value  # until weights.attach
    graph.model.graph.initializers[name] = value
    graph.parameters[name] = value
    return value


def joined_name(names: Sequence[str]) -> str:
    """a.q.weight and a.k.weight -> a.q+k.weight."""
    split = [name.split(".") for name in names]
    if len({len(parts) for parts in split}) > 1:
        return "+".join(names)
    columns = [list(dict.fromkeys(column)) for column in zip(*split, strict=True)]
    return ".".join("+".join(column) for column in columns)
