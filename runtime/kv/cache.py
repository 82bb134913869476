"""The KV cache: one pair of buffers per layer, each of its own capacity, written in place.

Elimination one by one is Elastic Cache's fixed point (arXiv 2407.18121); compaction by the latest
queries is this project's reading of LightVLM (arXiv 2509.00419).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lvlm.core.errors import DeviceMemoryError
from lvlm.runtime.backends import Backend, Buffer
from lvlm.runtime.bundle.manifest import Manifest, Text
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.policies.evictions import OneByOne

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class CompactCache:
    """Buffers key and value [B,Hkv,C_l,d] per layer, and which slots each row has in use.

    A row's entries lie in slots 0 up to its ``lengths`` [L,B]; ``seen`` [L,B] counts all that the
    layer ever cached for it. What happens to the surplus depends on the manifest's compression:

    - none, or one whose decode is to append: entries are only appended.
    - elimination one by one: a step that leaves more entries than the budget marks a victim, which
      counts neither as an entry nor for a position; the next token overwrites it. Nothing is moved.
    - interval: entries are only appended, hence lie in order of age, and every ``interval`` steps
      ``compaction`` gives the inputs of compact.onnx, which moves the survivors to the front in
      their order. Each layer also has its latest queries in a ring query [B,Hq,queries,d]. As the
      last ``recent`` >= ``queries`` entries survive every compaction, the own entry of the i-th
      latest query is always the i-th last.

    Decode covers the first ``active`` rows, at first all. A row can be filled on its own
    (``views``, ``begin``) and copied to another place; rows have budgets of their own then.

    The backend's memory belongs to the cache and is freed with it; graphs write through the buffers
    while this object counts. Not thread-safe, except that one thread may fill rows that are not
    active through their views while another decodes.
    """

    def __init__(
        self,
        backend: Backend,
        text: Text,
        dtype: str,
        batch: int,
        capacities: Sequence[int],
        budgets: Budgets,
    ) -> None:
        self.backend, self.active = backend, batch
        cache_policy = budgets.cache_policy
        self._queries = cache_policy.queries if cache_policy is not None else 0
        shapes = _shapes(text, self._queries, batch, capacities)
        item = ITEM_BYTES[dtype]
        self.bytes_allocated = sum(math.prod(s) for s in shapes.values()) * item
        self.buffers: dict[str, Buffer] = {}
        room = backend.room()
        if room is not None and self.bytes_allocated > room:
            raise self._no_room(batch, f", this machine has {room:,}")
        try:
            for name, buffer_shape in shapes.items():
                self.buffers[name] = backend.allocate(buffer_shape, dtype)
        except DeviceMemoryError as error:
            there = sum(math.prod(shapes[name]) for name in self.buffers) * item
            free = "" if error.free is None else f", {there + error.free:,} are free"
            raise self._no_room(batch, free) from None
        self._entry_bytes = 2 * text.kv_heads * text.head_dim * item
        query_bytes = text.heads * text.head_dim * item
        self._ring_bytes = len(capacities) * self._queries * query_bytes
        try:
            self._make_counts(budgets, batch, capacities)
        except MemoryError:
            raise self._no_room(batch, "") from None

    def _make_counts(self, budgets: Budgets, batch: int, capacities: Sequence[int]) -> None:
        shape, cache_policy = (len(capacities), batch), budgets.cache_policy
        self.budgets = replace(budgets, fractions=np.repeat(budgets.fractions, batch, axis=1))
        self.capacities = np.array(capacities, np.int64)
        self.lengths = np.zeros(shape, np.int64)
        self.seen = np.zeros(shape, np.int64)
        self.steps = np.zeros(batch, np.int64)  # tokens decoded since the prompt
        self.victims = np.full(shape, -1, np.int64)  # slots to be overwritten next, -1: none
        one_by_one = cache_policy is not None and isinstance(cache_policy.decode, OneByOne)
        self._queues = SlotQueues(*shape, int(self.capacities.max())) if one_by_one else None
        self._advanced = np.zeros(batch, bool)
        self._compacted: np.ndarray | None = None

    def _no_room(self, batch: int, there: str) -> DeviceMemoryError:
        return DeviceMemoryError(
            f"the cache (batch of {batch}) needs {self.bytes_allocated:,} bytes of memory{there}; "
            "ask for fewer prompts (slots) or new tokens at once, or export with a smaller "
            "--max-text-len or kv_keep"
        )

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

    def views(self, rows: slice) -> dict[str, Buffer]:
        """The buffers' rows from ``rows.start`` up to before ``rows.stop``: the same memory."""
        return {n: self.backend.rows(b, rows.start, rows.stop) for n, b in self.buffers.items()}

    def copy_row(self, source: int, target: int) -> None:
        """Everything of one row to another place; what was there is gone."""
        for name, buffer in self.buffers.items():
            which, _, layer = name.partition("_")
            used = self._queries if which == "query" else int(self.lengths[int(layer), source])
            self.backend.copy_row(buffer, source, target, used)
        states = [self.lengths, self.seen, self.victims, self.budgets.fractions]
        for state in [*states, *(self._queues.states if self._queues is not None else [])]:
            state[:, target] = state[:, source]
        self.steps[target] = self.steps[source]
        self._advanced[target] = self._advanced[source]

    def clear_row(self, row: int) -> None:
        """Zeros, after a fault: attention gives slots beyond the valid ones no weight, and no
        weight times what is not finite is not finite."""
        for buffer in self.buffers.values():
            self.backend.clear_row(buffer, row)

    def decode_inputs(
        self, tokens: np.ndarray, positions: np.ndarray, rows: slice | None = None
    ) -> dict[str, np.ndarray]:
        """Inputs of decode for some rows, the active ones by default: their newest tokens [B] and
        true positions [B]."""
        rows = slice(self.active) if rows is None else rows
        write_index, valid_length = self.next_slot()
        inputs = {
            "input_ids": tokens[:, None],
            "position_ids": self.positions(positions, rows)[:, None],
            "write_index": write_index[:, rows],
            "valid_length": valid_length[:, rows],
        }
        if self._queries:
            inputs["query_index"] = self.query_index[rows]
        return inputs

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
        first: np.ndarray = self._entries()[0, rows]
        return first

    @property
    def query_index(self) -> np.ndarray:
        """Ring slot [B] of each row's next query; the prompt's last one lies in the last slot."""
        return self.steps % self._queries

    def compaction(self) -> dict[str, np.ndarray] | None:
        """Inputs of compact.onnx if an active row has just completed an interval with too many
        entries.

        valid_length and kv_budget [L,B], query_slot [L,B,queries] (the slot of each ring query's
        own entry, -1: none), kv_slots_{l}. Rows that are not due keep what they have, unscored.
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
        # Ring slot r holds the query of `age` tokens ago, 1 the latest: (steps - age) % queries = r
        ring = np.arange(self._queries)
        age = (self.steps[active, None] - 1 - ring) % self._queries + 1
        slots = np.maximum(lengths[:, :, None] - age, -1)
        return {
            "valid_length": lengths.copy(),
            "kv_budget": self._compacted.copy(),
            "query_slot": np.where(due[:, None], slots, -1),
            **{
                f"kv_slots_{layer}": np.arange(budget, dtype=np.int64)
                for layer, budget in enumerate(self._compacted.max(axis=1))
            },
        }

    def compacted(self) -> None:
        """Count what compact.onnx left; call it right after the graph has run."""
        assert self._compacted is not None
        self.lengths[:, : self._compacted.shape[1]] = self._compacted

    def bytes_used(self, row: int) -> int:
        """Bytes of the entries of one row and of its ring of queries."""
        return int(self._entries()[:, row].sum() * self._entry_bytes + self._ring_bytes)

    def _entries(self) -> np.ndarray:
        """Entries [L,B] that are not to be overwritten."""
        return self.lengths - (self.victims >= 0)


def cache_bytes(manifest: Manifest, batch: int, capacities: Sequence[int]) -> int:
    """Bytes of a cache of ``batch`` rows."""
    queries = manifest.cache_policy.queries if manifest.cache_policy is not None else 0
    shapes = _shapes(manifest.text, queries, batch, capacities)
    return sum(math.prod(s) for s in shapes.values()) * ITEM_BYTES[manifest.cache_dtype]


def _shapes(
    text: Text, queries: int, batch: int, capacities: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Of every buffer, by name."""
    sizes = {"key": text.kv_heads, "value": text.kv_heads, "query": text.heads}
    return {
        f"{which}_{layer}": (batch, heads, slots, text.head_dim)
        for layer, capacity in enumerate(capacities)
        for which, heads in sizes.items()
        if (slots := queries if which == "query" else int(capacity)) > 0
    }


class SlotQueues:
    """First in, first out: a queue of slots per layer and row, each in a ring array."""

    def __init__(self, layers: int, batch: int, capacity: int) -> None:
        self.slots = np.zeros((layers, batch, capacity), np.int32)
        self.head = np.zeros((layers, batch), np.int64)
        self.count = np.zeros((layers, batch), np.int64)

    @property
    def states(self) -> list[np.ndarray]:
        """Arrays [L,B,...] that are all of it."""
        return [self.slots, self.head, self.count]

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
