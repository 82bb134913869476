"""MatMuls that read the same input become one, their weights stored side by side, then a Split.

Query, key and value; gate and up: one larger MatMul costs less than two or three on every
engine, most of all for the single rows of decode. It knows no model, only MatMul nodes, with or
without a bias, whose weights are initializers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.weights.expressions import Concat, sources
from lvlm.export.weights.store import WeightStore


@dataclass(frozen=True)
class LinearNodes:
    """x @ weight, or x @ weight + bias; ``result`` is the last of its nodes."""

    node: ir.Node
    weight: str
    bias: str | None
    result: ir.Node


@dataclass(frozen=True)
class FuseLinears:
    """Fuse linear layers in all graphs alike.

    A weight is stored once, so only what every graph uses in the same company is fused, and only
    tensors of the checkpoint of which ``kinds`` says the same, or nothing.
    Precondition: weights lie as MatMul takes them, [K,N].
    """

    kinds: Mapping[str, int] = field(default_factory=dict)

    def apply(self, graphs: Sequence[TracedGraph], store: WeightStore) -> None:
        groups = [_groups(graph, store, self.kinds) for graph in graphs]
        together: dict[str, set[tuple[str, ...] | None]] = {}
        for graph, found in zip(graphs, groups, strict=True):
            company = {p: names for members in found for names in _names(members) for p in names}
            for parameter in graph.parameters:
                together.setdefault(parameter, set()).add(company.get(parameter))
        for graph, found in zip(graphs, groups, strict=True):
            for members in found:
                names = _names(members)
                if all(together[p] == {group} for group in names for p in group):
                    _fuse(graph, members, store)


def _names(members: Sequence[LinearNodes]) -> list[tuple[str, ...]]:
    """The members' weights and, where there are, their biases."""
    return [
        tuple(m.weight for m in members),
        *([tuple(m.bias or "" for m in members)] if members[0].bias is not None else []),
    ]


def _groups(
    graph: TracedGraph, store: WeightStore, kinds: Mapping[str, int]
) -> list[list[LinearNodes]]:
    """Two and more MatMuls of one input, in the graph's order."""
    readers: dict[tuple[object, ...], list[LinearNodes]] = {}
    for node in graph.model.graph:
        linear = _linear(graph, node)
        if linear is not None:
            kind = frozenset(kinds.get(name) for name in sources(store[linear.weight]))
            key = (id(node.inputs[0]), linear.bias is None, kind)
            readers.setdefault(key, []).append(linear)
    return [members for members in readers.values() if len(members) > 1]


def _linear(graph: TracedGraph, node: ir.Node) -> LinearNodes | None:
    weight = _parameter(graph, node.inputs[1]) if node.op_type == "MatMul" else None
    if weight is None or node.domain != "" or len(graph.parameters[weight].shape or ()) != 2:
        return None
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and not node.outputs[0].is_graph_output():
        add = uses[0].node
        bias = _parameter(graph, add.inputs[1 - uses[0].idx])
        if bias is not None and len(graph.parameters[bias].shape or ()) == 1:
            return LinearNodes(node, weight, bias, add)
    return LinearNodes(node, weight, None, node)


def _parameter(graph: TracedGraph, value: ir.Value | None) -> str | None:
    """The name of a parameter that only one node reads."""
    name = None if value is None else value.name
    known = name in graph.parameters and graph.parameters[name] is value
    return name if known and value is not None and len(list(value.uses())) == 1 else None


def _fuse(graph: TracedGraph, members: Sequence[LinearNodes], store: WeightStore) -> None:
    """One MatMul in the members' place."""
    widths = [store[m.weight].shape[-1] for m in members]
    fused = [
        store.add(graph, joined_name(names), Concat(tuple(store[name] for name in names)))
        for names in _names(members)
    ]
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
        fused_output, member_output = node.outputs[0], first.result.outputs[0]
        fused_output.name = f"{name}_{node.op_type.lower()}"
        fused_output.type = member_output.type
        fused_output.shape = ir.Shape([*(member_output.shape or ())[:-1], sum(widths)])
    graph.model.graph.insert_before(first.node, [*nodes, sizes, split])
    for member, output in zip(members, split.outputs, strict=True):
        old = member.result.outputs[0]
        output.shape, output.type = old.shape, old.type
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        output.name, old.name = old.name, f"{old.name}_replaced"
        for node in dict.fromkeys((member.result, member.node)):
            graph.model.graph.remove(node, safe=True)
    for names in _names(members):
        for old_name in names:
            store.drop(graph, old_name)


def joined_name(names: Sequence[str]) -> str:
    """a.q.weight and a.k.weight -> a.q+k.weight."""
    split = [name.split(".") for name in names]
    if len({len(parts) for parts in split}) > 1:
        return "+".join(names)
    columns = [list(dict.fromkeys(column)) for column in zip(*split, strict=True)]
    return ".".join("+".join(column) for column in columns)
