"""The KV cache: one pair of buffers per layer, each of its own capacity, written in place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lvlm.core.errors import DeviceMemoryError
from lvlm.runtime.backends import Backend, Buffer
from lvlm.runtime.bundle.manifest import Manifest, Text
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.slot_counts import SlotCounts

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class CompactCache(SlotCounts):
    """Buffers key and value [B,Hkv,C_l,d] per layer, with a ring of queries also query
    [B,Hq,queries,d], and the counts of what lies in them.

    A row can be filled on its own (``views``, ``begin``) and copied to another place.

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
        self.backend = backend
        queries = budgets.cache_policy.queries if budgets.cache_policy is not None else 0
        shapes = _shapes(text, queries, batch, capacities)
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
        self._ring_bytes = len(capacities) * queries * query_bytes
        try:
            super().__init__(budgets, batch, capacities)
        except MemoryError:
            raise self._no_room(batch, "") from None

    def _no_room(self, batch: int, there: str) -> DeviceMemoryError:
        return DeviceMemoryError(
            f"the cache (batch of {batch}) needs {self.bytes_allocated:,} bytes of memory{there}; "
            "ask for fewer prompts (slots) or new tokens at once, or export with a smaller "
            "--max-text-len or kv_keep"
        )

    def views(self, rows: slice) -> dict[str, Buffer]:
        """The buffers' rows from ``rows.start`` up to before ``rows.stop``: the same memory."""
        return {n: self.backend.rows(b, rows.start, rows.stop) for n, b in self.buffers.items()}

    def copy_row(self, source: int, target: int) -> None:
        """Everything of one row to another place; what was there is gone."""
        for name, buffer in self.buffers.items():
            which, _, layer = name.partition("_")
            used = self.queries if which == "query" else int(self.lengths[int(layer), source])
            self.backend.copy_row(buffer, source, target, used)
        self.put(target, self, source)

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
        if self.queries:
            inputs["query_index"] = self.query_index[rows]
        return inputs

    def bytes_used(self, row: int) -> int:
        """Bytes of the entries of one row and of its ring of queries."""
        return int(self.entries[:, row].sum() * self._entry_bytes + self._ring_bytes)


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
