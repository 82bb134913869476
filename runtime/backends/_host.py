"""Buffers in the host's memory: numpy arrays."""

from __future__ import annotations

import numpy as np

from lvlm.runtime.backends import Buffer, host_dtype


class HostMemory:
    """What backends whose buffers are numpy arrays have in common."""

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        return np.zeros(shape, host_dtype(dtype))

    def rows(self, buffer: Buffer, start: int, stop: int) -> Buffer:
        return buffer[start:stop]

    def copy_row(self, buffer: Buffer, source: int, target: int, used: int) -> None:
        buffer[target, :, :used] = buffer[source, :, :used]

    def clear_row(self, buffer: Buffer, row: int) -> None:
        buffer[row] = 0
