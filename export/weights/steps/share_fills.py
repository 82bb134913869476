"""Weights that are one byte over and over, as zero points are, lie inside the largest of them."""

from __future__ import annotations

from collections.abc import Sequence

from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.weights.expressions import Fill, nbytes
from lvlm.export.weights.store import WeightStore


class ShareFills:
    """Put fills of one byte into one place, at the file's end."""

    def apply(self, graphs: Sequence[TracedGraph], store: WeightStore) -> None:  # noqa: ARG002
        by_byte: dict[int, list[str]] = {}
        for name in store:
            if isinstance(fill := store[name], Fill):
                by_byte.setdefault(fill.byte, []).append(name)
        for names in by_byte.values():
            names.sort(key=lambda name: -nbytes(store[name]))
            store.within |= dict.fromkeys(names[1:], names[0])
        fills = [name for names in by_byte.values() for name in names]
        store.order([*(name for name in store if name not in fills), *fills])
