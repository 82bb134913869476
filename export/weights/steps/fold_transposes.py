"""Weights that every graph uses transposed are stored transposed, and the Transpose nodes go.

A linear layer of torch multiplies with the transposed weight; ONNX Runtime would fold that
Transpose into a second copy per session.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.weights.expressions import Transpose
from lvlm.export.weights.store import WeightStore


class FoldTransposes:
    """Store a weight [N,K] as [K,N] where nothing reads it otherwise."""

    def apply(self, graphs: Sequence[TracedGraph], store: WeightStore) -> None:
        uses: dict[str, list[bool]] = {}
        for graph in graphs:
            for name, value in graph.parameters.items():
                uses.setdefault(name, []).extend(_is_transpose(node) for node, _ in value.uses())
        for name in (name for name, transposed in uses.items() if all(transposed)):
            store.replace(graphs, name, Transpose(store[name]))
            for graph in graphs:
                if name in graph.parameters:
                    _take_place(graph, graph.parameters[name])


def _is_transpose(node: ir.Node) -> bool:
    permutation = node.attributes.get("perm") if node.op_type == "Transpose" else None
    return permutation is not None and list(permutation.as_ints()) == [1, 0]


def _take_place(graph: TracedGraph, value: ir.Value) -> None:
    """``value`` instead of its transposes."""
    for node, _ in list(value.uses()):
        node.outputs[0].replace_all_uses_with(value)
        graph.model.graph.remove(node, safe=True)
