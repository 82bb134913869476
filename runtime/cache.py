"""The KV cache: one pair of buffers per layer, each of its own capacity, written in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lvlm.runtime.backends import Backend, Buffer


class CompactCache:
    """Buffers [B,Hkv,C_l,d] per layer and how many entries each row has in them.

    Owned by one Engine; graphs write through the buffers while ``lengths`` counts. Capacities may
    differ from layer to layer: a reduced sequence leaves fewer entries.
    """

    def __init__(
        self,
        backend: Backend,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: str,
        capacities: Sequence[int],
    ) -> None:
        self.capacities = np.array(capacities, np.int64)
        self.lengths = np.zeros((len(capacities), batch), np.int64)
        self.buffers: dict[str, Buffer] = {}
        for layer, capacity in enumerate(capacities):
            for which in ("key", "value"):
                shape = (batch, kv_heads, int(capacity), head_dim)
                self.buffers[f"{which}_{layer}"] = backend.allocate(shape, dtype)
        self._entry_bytes = 2 * kv_heads * head_dim * np.dtype(dtype).itemsize

    def begin(self, entries: np.ndarray) -> None:
        """After prefill wrote ``entries`` [L,B] from slot 0 on."""
        self.lengths[:] = entries

    def next_slot(self) -> tuple[np.ndarray, np.ndarray]:
        """write_index and valid_length [L,B] of the next decode step.

        A row that has finished and is full overwrites its own last entry; nobody reads it.
        """
        index = np.minimum(self.lengths, self.capacities[:, None] - 1)
        return index, index + 1

    def advance(self, rows: np.ndarray) -> None:
        """Count the entry just written for the rows where ``rows`` [B] is True."""
        self.lengths[:, rows] += 1

    def as_past(self) -> dict[str, Buffer]:
        return {f"past_{name}": buffer for name, buffer in self.buffers.items()}

    def as_present(self) -> dict[str, Buffer]:
        return {f"present_{name}": buffer for name, buffer in self.buffers.items()}

    @property
    def bytes_allocated(self) -> int:
        return int(self.capacities.sum() * self.lengths.shape[1] * self._entry_bytes)

    def bytes_used(self, row: int) -> int:
        """Bytes of the valid entries of one row."""
        return int(self.lengths[:, row].sum() * self._entry_bytes)
