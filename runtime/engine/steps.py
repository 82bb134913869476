"""Steps of all running requests at once, and which of them a fault concerns."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lvlm.core.errors import BackendError
from lvlm.runtime.backends import BEST, Call
from lvlm.runtime.engine.slots import Slots
from lvlm.runtime.generate.loaded_graphs import Graphs, check_kept


class Steps:
    """Decode and compact over the running rows. For one thread.

    ``logits`` [slots,vocabulary] float32 are those of the last decode that was not ``greedy``,
    ``best`` [slots] int64 what the last one chose, of a graph that does (BEST). ``together``: every
    graph is run over all of the rows, and a fault is that of all (see Batch).
    """

    def __init__(self, graphs: Graphs, slots: Slots, *, together: bool = False) -> None:
        self.graphs, self.slots, self.together = graphs, slots, together
        self.logits = np.empty((slots.count, graphs.manifest.text.vocab), np.float32)
        self.best = np.empty(slots.count, np.int64)
        self.greedy = False
        self.calls: dict[tuple[str, int, int], Call] = {}

    def run(self, *, greedy: bool = False) -> dict[int, Exception]:
        """One decode step of every running request; places of those that failed, and why.
        ``greedy``: logits are for nothing but the likeliest token, which a graph may choose."""
        self.greedy = greedy and self.graphs.chooses
        running = self.slots.running
        failed = self._decode(len(running))
        advanced = np.zeros(self.slots.count, bool)
        for place, request in enumerate(running):
            advanced[place] = place not in failed and request.row.finish_reason is None
        self.slots.cache.advance(advanced)
        return failed | self._compact()

    @property
    def finite(self) -> bool:
        """True where the last logits of all rows are finite."""
        if self.greedy:
            return bool((self.best >= 0).all())
        return bool(np.isfinite(self.logits).all())

    def _decode(self, count: int) -> dict[int, Exception]:
        """Decode a step of all rows. If it fails it is tried row by row, so that one request's
        fault is not the others': a step writes the same slots again, and nothing is counted before
        it is done. But for sums of attention and for states: some layers' may have gone on
        already, and would twice."""
        tokens = np.array([r.next_token for r in self.slots.running], np.int64)
        positions = np.array([r.row.position for r in self.slots.running], np.int64)
        wanted: dict[str, np.ndarray] = {BEST: self.best} if self.graphs.chooses else {}
        if not self.greedy:
            wanted["logits"] = self.logits

        def decode(rows: slice) -> dict[int, Exception]:
            try:
                inputs = self.slots.cache.decode_inputs(tokens[rows], positions[rows], rows)
                given = {name: array[rows] for name, array in wanted.items()}
                self._call("decode", rows.start, rows.stop)(inputs, given)
            except Exception as error:
                return dict.fromkeys(range(rows.start, rows.stop), error)
            return {}

        failed = decode(slice(0, count))
        if not failed or count == 1 or self.together or self.slots.cache.goes_on:
            return failed
        failed = {}
        for place in range(count):
            failed |= decode(slice(place, place + 1))
        return failed

    def _compact(self) -> dict[int, Exception]:
        """Drop entries of the rows whose interval is over."""
        cache = self.slots.cache
        inputs = cache.compaction()
        if inputs is None:
            return {}
        due = np.flatnonzero((inputs["kv_budget"] != inputs["valid_length"]).any(0))
        # Rows side by side together, none between: the graph would copy it
        groups = np.split(due, np.flatnonzero(np.diff(due) > 1) + 1)
        if self.together:
            groups = [np.arange(inputs["kv_budget"].shape[1])]
        failed: dict[int, Exception] = {}
        for group in groups:
            failed |= self._compact_rows(inputs, slice(int(group[0]), int(group[-1]) + 1))
        cache.compacted()
        return failed

    def _compact_rows(self, inputs: Mapping[str, np.ndarray], rows: slice) -> dict[int, Exception]:
        some = _of_rows(inputs, rows)
        places = range(rows.start, rows.stop)
        kept = np.empty_like(some["kv_budget"])
        try:
            self._call("compact", rows.start, rows.stop)(some, {"kept": kept})
            if self.together:
                check_kept(kept, some["kv_budget"])
        except Exception as error:
            # Not again row by row: some layers may have been compacted, and would be twice.
            return dict.fromkeys(places, error)
        failed: dict[int, Exception] = {}
        for column, place in enumerate(places):
            one = slice(column, column + 1)
            try:
                check_kept(kept[:, one], some["kv_budget"][:, one])
            except BackendError as error:
                failed[place] = error
        return failed

    def _call(self, name: str, start: int, stop: int) -> Call:
        """A graph over some rows, bound once."""
        key = (name, start, stop)
        if key not in self.calls:
            self.calls[key] = self.graphs.bind(name, self.slots.cache.views(slice(start, stop)))
        return self.calls[key]


def _of_rows(inputs: Mapping[str, np.ndarray], rows: slice) -> dict[str, np.ndarray]:
    """Inputs of compact.onnx for some of the rows."""
    per_row = ("valid_length", "kv_budget", "query_slot")
    some = {name: inputs[name][:, rows] for name in per_row if name in inputs}
    for layer, budget in enumerate(some["kv_budget"].max(1)):
        some[f"kv_slots_{layer}"] = np.arange(budget, dtype=np.int64)
    return some
