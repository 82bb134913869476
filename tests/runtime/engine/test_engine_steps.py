"""Which rows a step compacts, and whom a fault concerns."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm.core.errors import BackendError
from lvlm.runtime.engine.faults import typed
from lvlm.runtime.engine.steps import Steps

LAYERS, QUERIES = 2, 3


class Rows:
    """As much of a cache and of graphs as a compaction asks for; its buffers are the rows asked."""

    def __init__(self, due: list[bool], *, broken: int | None = None) -> None:
        self.due, self.broken = np.array(due), broken
        self.calls: list[tuple[int, int]] = []
        self.counted = 0
        self.manifest = SimpleNamespace(text=SimpleNamespace(vocab=8))
        self.cache, self.count = self, len(due)

    def compaction(self) -> dict[str, np.ndarray] | None:
        if not self.due.any():
            return None
        valid = np.full((LAYERS, self.count), 9)
        slots = np.arange(self.count)[None, :, None].repeat(LAYERS, 0).repeat(QUERIES, 2)
        return {
            "valid_length": valid,
            "kv_budget": np.where(self.due, 5, valid),
            "query_slot": slots,
        }

    def compacted(self) -> None:
        self.counted += 1

    def views(self, rows: slice) -> slice:
        return rows

    def bind(self, name: str, rows: slice) -> Any:
        assert name == "compact"

        def call(inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
            self.calls.append((rows.start, rows.stop))
            assert inputs["query_slot"][0, :, 0].tolist() == list(range(rows.start, rows.stop))
            assert inputs["kv_slots_1"].tolist() == list(range(inputs["kv_budget"].max()))
            if self.broken is not None and rows.start <= self.broken < rows.stop:
                raise MemoryError("none")
            outputs["kept"][:] = inputs["kv_budget"]

        return call


def compact(rows: Rows, *, together: bool = False) -> dict[int, Any]:
    return Steps(rows, rows, together=together)._compact()  # type: ignore[arg-type]


@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_every_due_row_once_and_no_other(due: list[bool]) -> None:
    rows = Rows(due)
    assert compact(rows) == {}
    covered = [row for start, stop in rows.calls for row in range(start, stop)]
    assert covered == np.flatnonzero(due).tolist()
    assert all(stop < start for (_, stop), (start, _) in pairwise(rows.calls))
    assert rows.counted == any(due)


@pytest.mark.parametrize(("broken", "lost"), [(0, {0}), (2, {2, 3}), (3, {2, 3})])
def test_a_fault_is_that_of_the_rows_beside_it(broken: int, lost: set[int]) -> None:
    rows = Rows([True, False, True, True], broken=broken)
    failed = compact(rows)
    assert failed.keys() == lost
    told = [typed(error) for error in failed.values()]
    assert all(isinstance(error, BackendError) for error in told)
    assert len({id(error) for error in told}) == len(lost)  # one for each caller
    assert (rows.calls, rows.counted) == ([(0, 1), (2, 4)], 1)


def test_a_fault_of_one_call_is_that_of_all_its_rows() -> None:
    """One run over every row, due or not: an engine may be built for exactly that many."""
    rows = Rows([False, True, False, True])
    assert compact(rows, together=True) == {}
    assert rows.calls == [(0, 4)]
    rows = Rows([True, False, True, True], broken=2)
    assert compact(rows, together=True).keys() == {0, 1, 2, 3}
    assert rows.calls == [(0, 4)]
