"""What is run for all running requests at once, and which of them a fault concerns."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lvlm.core.errors import BackendError, LvlmError
from lvlm.runtime.backends import Call
from lvlm.runtime.engine.slots import Slots
from lvlm.runtime.generate.loaded_graphs import Graphs, check_kept


class Steps:
    """Decode and compact over the running rows. For one thread.

    ``logits`` [slots,vocabulary] float32 are those of the last decode.
    """

    def __init__(self, graphs: Graphs, slots: Slots) -> None:
        self.graphs, self.slots = graphs, slots
        self.logits = np.empty((slots.count, graphs.manifest.text.vocab), np.float32)
        self.calls: dict[tuple[str, int, int], Call] = {}

    def run(self) -> dict[int, LvlmError]:
        """One decode step of every running request; places of those that failed, and why."""
        count = len(self.slots.running)
        failed = self._decode(count)
        advanced = np.zeros(self.slots.count, bool)
        advanced[:count] = [place not in failed for place in range(count)]
        self.slots.cache.advance(advanced)
        return failed | self._compact()

    def _decode(self, count: int) -> dict[int, LvlmError]:
        """If it fails for all at once it is tried row by row, so that one request's fault is not
        the others': a step writes the same slots again, and nothing is counted before it is done.
        """
        tokens = np.array([r.next_token for r in self.slots.running], np.int64)
        positions = np.array([r.row.position for r in self.slots.running], np.int64)

        def decode(rows: slice) -> None:
            inputs = self.slots.cache.decode_inputs(tokens[rows], positions[rows], rows)
            self._call("decode", rows.start, rows.stop)(inputs, {"logits": self.logits[rows]})

        try:
            decode(slice(0, count))
            return {}
        except Exception as error:
            if count == 1:
                return {0: typed(error)}
        failed = {}
        for place in range(count):
            try:
                decode(slice(place, place + 1))
            except Exception as error:
                failed[place] = typed(error)
        return failed

    def _compact(self) -> dict[int, LvlmError]:
        """Drop entries of the rows whose interval is over."""
        cache = self.slots.cache
        inputs = cache.compaction()
        if inputs is None:
            return {}
        due = np.flatnonzero((inputs["kv_budget"] != inputs["valid_length"]).any(0))
        failed: dict[int, LvlmError] = {}
        # Rows side by side together, none between: the graph would copy it
        for group in np.split(due, np.flatnonzero(np.diff(due) > 1) + 1):
            failed |= self._compact_rows(inputs, slice(int(group[0]), int(group[-1]) + 1))
        cache.compacted()
        return failed

    def _compact_rows(self, inputs: Mapping[str, np.ndarray], rows: slice) -> dict[int, LvlmError]:
        some = _of_rows(inputs, rows)
        kept = np.empty_like(some["kv_budget"])
        try:
            self._call("compact", rows.start, rows.stop)(some, {"kept": kept})
        except Exception as error:
            # Not again row by row: some layers may have been compacted, and would be twice.
            return {place: again(typed(error)) for place in range(rows.start, rows.stop)}
        failed: dict[int, LvlmError] = {}
        for place in range(rows.stop - rows.start):
            one = slice(place, place + 1)
            try:
                check_kept(kept[:, one], some["kv_budget"][:, one])
            except BackendError as error:
                failed[rows.start + place] = typed(error)
        return failed

    def _call(self, name: str, start: int, stop: int) -> Call:
        """A graph over some rows, bound once."""
        key = (name, start, stop)
        if key not in self.calls:
            self.calls[key] = self.graphs.bind(name, self.slots.cache.views(slice(start, stop)))
        return self.calls[key]


def _of_rows(inputs: Mapping[str, np.ndarray], rows: slice) -> dict[str, np.ndarray]:
    """Inputs of compact.onnx for some of the rows."""
    some = {name: inputs[name][:, rows] for name in ("valid_length", "kv_budget", "query_slot")}
    for layer, most in enumerate(some["kv_budget"].max(1)):
        some[f"kv_slots_{layer}"] = np.arange(most, dtype=np.int64)
    return some


def typed(error: BaseException) -> LvlmError:
    """The error for one request's caller.

    Without its traceback, whose frames would keep the cache alive for as long as someone keeps the
    error.
    """
    if not isinstance(error, LvlmError):
        return BackendError(f"the backend failed ({described(error)}); the request is lost")
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def again(error: LvlmError) -> LvlmError:
    """The same error for another caller."""
    return type(error)(str(error))


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
