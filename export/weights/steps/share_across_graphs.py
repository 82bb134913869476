"""A weight is stored once, whichever graphs read it."""

from __future__ import annotations

from collections.abc import Sequence

from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.weights.store import WeightStore


class ShareAcrossGraphs:
    """Keep what the graphs hold, in the order they do, one graph after the other; what earlier
    steps have replaced is gone."""

    def apply(self, graphs: Sequence[TracedGraph], store: WeightStore) -> None:
        store.order(list(dict.fromkeys(name for graph in graphs for name in graph.parameters)))
