"""Counts of a cache's slots: which are in use, which one is written next.

Elimination one by one is Elastic Cache's fixed point (arXiv 2407.18121); compaction by the latest
queries is this project's reading of LightVLM (arXiv 2509.00419).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lvlm.runtime.kv.budgets import Budgets


class SlotCounts:
    """Counts of the slots that each row of each layer has in use, of ``capacities`` [L].

    A row's entries lie in slots 0 up to its ``lengths`` [L,B]; ``seen`` [L,B] counts all that the
    layer ever cached for it. What happens to the surplus depends on the manifest's compression:

    - none, or one whose decode is to append: entries are only appended.
    - elimination one by one: a step that leaves more entries than the budget marks a victim, which
      counts neither as an entry nor for a position; the next token overwrites it. Nothing is moved.
    - interval: entries are only appended, hence lie in order of age, and every ``interval`` steps
      ``compaction`` gives the inputs of compact.onnx, which moves the survivors to the front in
      their order. Each layer also has its latest queries in a ring query [B,Hq,queries,d]. As the
      last ``recent`` >= ``queries`` entries survive every compaction, the own entry of the i-th
      latest query is always the i-th last. Or it has scores that go on, received [B,1,C,1], and no
      ring.

    Decode covers the first ``active`` rows, at first all; rows have budgets of their own.
    """

    def __init__(self, budgets: Budgets, batch: int, capacities: Sequence[int]) -> None:
        shape, cache_policy = (len(capacities), batch), budgets.cache_policy
        self.active = batch
        self.queries = cache_policy.queries if cache_policy is not None else 0
        self.sums = cache_policy is not None and cache_policy.sums
        self.budgets = replace(budgets, fractions=np.repeat(budgets.fractions, batch, axis=1))
        self.capacities = np.array(capacities, np.int64)
        self.lengths = np.zeros(shape, np.int64)
        self.seen = np.zeros(shape, np.int64)
        self.steps = np.zeros(batch, np.int64)  # tokens decoded since the prompt
        self.victims = np.full(shape, -1, np.int64)  # slots to be overwritten next, -1: none
        one_by_one = cache_policy is not None and cache_policy.decode.one_by_one
        self._queues = SlotQueues(*shape, int(self.capacities.max())) if one_by_one else None
        self._advanced = np.zeros(batch, bool)
        self._compacted: np.ndarray | None = None

    def begin(
        self,
        seen: np.ndarray,
        kept: np.ndarray,
        rows: slice = slice(None),
        budgets: Budgets | None = None,
    ) -> None:
        """After prefill wrote ``kept`` [L,rows] of the ``seen`` [L,rows] entries from slot 0 on.

        ``budgets`` of these rows, where they differ from those that the cache was made with.
        """
        if budgets is not None:
            self.budgets.fractions[:, rows] = budgets.fractions
        self.seen[:, rows], self.lengths[:, rows] = seen, kept
        self.victims[:, rows], self.steps[rows], self._advanced[rows] = -1, 0, False
        self._compacted = None
        if self._queues is not None:
            self._queues.start(self.budgets.fixed_point(self.lengths), self.lengths, rows)

    def row(self, row: int) -> SlotCounts:
        """One row's counts on their own: a copy."""
        fractions = self.budgets.fractions[:, row : row + 1]
        one = SlotCounts(replace(self.budgets, fractions=fractions), 1, self.capacities.tolist())
        one.put(0, self, row)
        return one

    def put(self, row: int, other: SlotCounts, source: int = 0) -> None:
        """A row's counts are what another's ``source`` are."""
        for own, theirs in zip(self._states(), other._states(), strict=True):
            own[..., row] = theirs[..., source]
        if self._queues is not None and other._queues is not None:
            self._queues.put(row, other._queues, source)

    def _states(self) -> list[np.ndarray]:
        """Arrays [...,B] that, with the queues, are all there is to know of a row."""
        counted = [self.lengths, self.seen, self.victims, self.budgets.fractions]
        return [*counted, self.steps, self._advanced]

    def next_slot(self) -> tuple[np.ndarray, np.ndarray]:
        """write_index and valid_length [L,B] of the next decode step.

        A row that has finished and is full overwrites its own last entry; nobody reads it.
        """
        free = np.minimum(self.lengths, self.capacities[:, None] - 1)
        index = np.where(self.victims >= 0, self.victims, free)
        return index, np.maximum(self.lengths, index + 1)

    def advance(self, rows: np.ndarray) -> None:
        """Count the entry just written for the rows where ``rows`` [B] is True, which must have had
        room for it, and mark the next victims."""
        written, _ = self.next_slot()
        self.lengths += rows & (self.victims < 0)
        assert (self.lengths <= self.capacities[:, None]).all()
        self.seen += rows
        self.steps += rows
        self._advanced[:] = rows
        if self._queues is not None:
            running = np.broadcast_to(rows, self.lengths.shape)
            self.victims[running] = -1
            self._queues.push(running, written)
            surplus = running & (self.lengths > self.budgets.step(self.seen))
            self.victims[surplus] = self._queues.pop(surplus)

    def positions(self, true: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        """Positions [B] of some rows' next tokens, whose ``true`` ones [B] the released code of two
        papers replaces by the length of layer 0's cache."""
        cache_policy = self.budgets.cache_policy
        if cache_policy is None or cache_policy.positions == "true":
            return true
        first: np.ndarray = self.entries[0, rows]
        return first

    @property
    def query_index(self) -> np.ndarray:
        """Ring slot [B] of each row's next query; the prompt's last one lies in the last slot."""
        return self.steps % self.queries

    @property
    def until_compaction(self) -> int | None:
        """Steps of row 0 up to and with the one that ends its interval; None: there are none."""
        cache_policy = self.budgets.cache_policy
        if cache_policy is None or cache_policy.interval is None:
            return None
        return cache_policy.interval - int(self.steps[0]) % cache_policy.interval

    def compaction(self) -> dict[str, np.ndarray] | None:
        """Inputs of compact.onnx if an active row has just completed an interval with too many
        entries.

        valid_length and kv_budget [L,B], with a ring query_slot [L,B,queries] (the slot of each
        ring query's own entry, -1: none), kv_slots_{l}. Rows that are not due keep all they have.
        """
        cache_policy = self.budgets.cache_policy
        if cache_policy is None or cache_policy.interval is None:
            return None
        active = slice(self.active)
        due = (self._advanced & (self.steps % cache_policy.interval == 0))[active]
        lengths = self.lengths[:, active]
        budget = np.minimum(self.lengths, self.budgets.step(self.seen))[:, active]
        self._compacted = np.where(due, budget, lengths)
        if np.array_equal(self._compacted, lengths):
            return None
        inputs = {"valid_length": lengths.copy(), "kv_budget": self._compacted.copy()}
        if self.queries:
            # Slot r holds the query of `age` tokens ago, 1 the latest: (steps - age) % queries = r
            ring = np.arange(self.queries)
            age = (self.steps[active, None] - 1 - ring) % self.queries + 1
            slots = np.maximum(lengths[:, :, None] - age, -1)
            inputs["query_slot"] = np.where(due[:, None], slots, -1)
        for layer, budget in enumerate(self._compacted.max(axis=1)):
            inputs[f"kv_slots_{layer}"] = np.arange(budget, dtype=np.int64)
        return inputs

    def compacted(self) -> None:
        """Count what compact.onnx left; call it right after the graph has run."""
        assert self._compacted is not None
        self.lengths[:, : self._compacted.shape[1]] = self._compacted

    @property
    def entries(self) -> np.ndarray:
        """Entries [L,B] that are not to be overwritten."""
        return self.lengths - (self.victims >= 0)


class SlotQueues:
    """First in, first out: a queue of slots per layer and row, each in a ring array."""

    def __init__(self, layers: int, batch: int, capacity: int) -> None:
        self.slots = np.zeros((layers, batch, capacity), np.int32)
        self.head = np.zeros((layers, batch), np.int64)
        self.count = np.zeros((layers, batch), np.int64)

    def put(self, row: int, other: SlotQueues, source: int) -> None:
        """A row's queues are what another's ``source`` are."""
        self.slots[:, row] = other.slots[:, source]
        self.head[:, row] = other.head[:, source]
        self.count[:, row] = other.count[:, source]

    def start(self, first: np.ndarray, last: np.ndarray, rows: slice = slice(None)) -> None:
        """Queues of the slots from ``first`` [L,B] up to before ``last`` [L,B], of some rows. Where
        ``first`` is greater, as many of the slots pushed next do not enter the queue."""
        self.slots[:, rows] = first[:, rows, None] + np.arange(self.slots.shape[2])
        self.head[:, rows], self.count[:, rows] = 0, (last - first)[:, rows]

    def push(self, where: np.ndarray, slots: np.ndarray) -> None:
        """Append ``slots`` [L,B] to the queues where ``where`` [L,B] is True."""
        end = (self.head + self.count) % self.slots.shape[2]
        self.slots[(*np.nonzero(where), end[where])] = slots[where]
        self.count += where

    def pop(self, where: np.ndarray) -> np.ndarray:
        """The oldest slots of the queues where ``where`` [L,B] is True, in the mask's order."""
        oldest: np.ndarray = self.slots[(*np.nonzero(where), self.head[where])]
        self.head[where] = (self.head[where] + 1) % self.slots.shape[2]
        self.count -= where
        return oldest
