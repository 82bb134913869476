"""The KV cache: one pair of buffers per layer, each of its own capacity, written in place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lvlm.core.errors import DeviceMemoryError
from lvlm.runtime.backends import Backend, Buffer
from lvlm.runtime.bundle.entry_form import ITEM_BYTES, entry_width, side_dtype
from lvlm.runtime.bundle.manifest import Manifest, Text
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.slot_counts import SlotCounts
from lvlm.runtime.policies.policy import CachePolicy

SCORES = "float32"  # attention received: sums add small numbers to large ones
Form = tuple[tuple[int, ...], str]  # a buffer's shape and dtype


class CompactCache(SlotCounts):
    """Buffers key and value [B,Hkv,C_l,d] per layer (int8: d + 1, entry_form.py); with a ring of
    queries also query [B,Hq,queries,d], with scores that go on received [B,1,C_l,1]; one or two of
    state [B,s,n,D] for s layers that keep these in place of entries; and the counts of what lies in
    them.

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
        self.backend, self.states = backend, text.states
        policy = budgets.cache_policy
        forms = _forms(text, policy, dtype, batch, capacities)
        self.bytes_allocated = sum(_bytes(form) for form in forms.values())
        self.buffers: dict[str, Buffer] = {}
        room = backend.room()
        if room is not None and self.bytes_allocated > room:
            raise self._no_room(batch, f", this machine has {room:,}")
        try:
            for name, (shape, its_dtype) in forms.items():
                self.buffers[name] = backend.allocate(shape, its_dtype)
        except DeviceMemoryError as error:
            there = sum(_bytes(forms[name]) for name in self.buffers)
            free = "" if error.free is None else f", {there + error.free:,} are free"
            raise self._no_room(batch, free) from None
        try:
            super().__init__(budgets, batch, capacities)
        except MemoryError:
            raise self._no_room(batch, "") from None
        scores = ITEM_BYTES[SCORES] if policy is not None and policy.received else 0
        entry = entry_width(text.head_dim, dtype) * ITEM_BYTES[dtype]
        self._entry_bytes = 2 * text.kv_heads * entry + scores
        rings = len(capacities) * self.queries * text.heads * text.head_dim
        states = (_bytes(form) for form in text.state_forms(dtype))
        self._fixed_bytes = rings * ITEM_BYTES[side_dtype(dtype)] + sum(states)

    def _no_room(self, batch: int, there: str) -> DeviceMemoryError:
        return DeviceMemoryError(
            f"the cache (batch of {batch}) needs {self.bytes_allocated:,} bytes of memory{there}; "
            "ask for fewer prompts (slots) or new tokens at once, or export with a smaller "
            "--max-text-len or kv_keep"
        )

    @property
    def goes_on(self) -> bool:
        """True where a decode step goes on from what the last one left, so that it cannot be run
        again: with sums of attention, and with states."""
        return self.sums or bool(self.states)

    def views(self, rows: slice) -> dict[str, Buffer]:
        """The buffers' rows from ``rows.start`` up to before ``rows.stop``: the same memory."""
        return {n: self.backend.rows(b, rows.start, rows.stop) for n, b in self.buffers.items()}

    def copy_row(self, source: int, target: int) -> None:
        """Everything of one row to another place; what was there is gone."""
        for name, buffer in self.buffers.items():
            which, _, layer = name.partition("_")
            if which == "query":
                used = self.queries
            elif which == "state":
                used = self.states[int(layer)][1]
            else:
                used = int(self.lengths[int(layer), source])
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
        """Bytes of the entries of one row, with their scores, of its ring of queries and states."""
        return int(self.entries[:, row].sum() * self._entry_bytes + self._fixed_bytes)


def cache_bytes(manifest: Manifest, batch: int, capacities: Sequence[int]) -> int:
    """Bytes of a cache of ``batch`` rows."""
    forms = _forms(manifest.text, manifest.cache_policy, manifest.cache_dtype, batch, capacities)
    return sum(_bytes(form) for form in forms.values())


def _forms(
    text: Text, policy: CachePolicy | None, dtype: str, batch: int, capacities: Sequence[int]
) -> dict[str, Form]:
    """Shape and dtype of every buffer, by name."""
    forms: dict[str, Form] = {}
    width, beside = entry_width(text.head_dim, dtype), side_dtype(dtype)
    for layer, capacity in enumerate(map(int, capacities)):
        if capacity:
            entries = (batch, text.kv_heads, capacity, width), dtype
            forms |= {f"key_{layer}": entries, f"value_{layer}": entries}
        if policy is not None and policy.queries:
            shape = batch, text.heads, policy.queries, text.head_dim
            forms[f"query_{layer}"] = shape, beside
        if policy is not None and policy.received and capacity:
            forms[f"received_{layer}"] = (batch, 1, capacity, 1), SCORES
    for number, (sizes, its_dtype) in enumerate(text.state_forms(dtype)):
        forms[f"state_{number}"] = (batch, *sizes), its_dtype
    return forms


def _bytes(form: Form) -> int:
    shape, dtype = form
    return math.prod(shape) * ITEM_BYTES[dtype]
