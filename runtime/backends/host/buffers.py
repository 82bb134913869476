"""Buffers in the host's memory: numpy arrays."""

from __future__ import annotations

import math
import os

import numpy as np

from lvlm.core.errors import BackendError, DeviceMemoryError
from lvlm.runtime.backends import Buffer, Gate, host_dtype

# How libraries say that they got no memory, beside Python's own MemoryError
SHORT = ("out of memory", "failed to allocate", "bad_alloc", "bad allocation", "than requested")


class HostMemory:
    """Base of backends whose buffers are numpy arrays."""

    def gate(self) -> Gate | None:
        return None

    def room(self) -> int | None:
        """The machine's memory: the system gives it when it is first written, and ends a program
        that asked for more than there is only then."""
        return physical_memory()

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        kind = np.dtype(host_dtype(dtype))
        try:
            return np.zeros(shape, kind)
        except (MemoryError, ValueError, OverflowError):  # the latter: more than can be addressed
            size = math.prod(shape) * kind.itemsize
            raise DeviceMemoryError(
                f"there are no {size:,} bytes of memory for a buffer; give fewer prompts at once"
            ) from None

    def rows(self, buffer: Buffer, start: int, stop: int) -> Buffer:
        return buffer[start:stop]

    def copy_row(self, buffer: Buffer, source: int, target: int, used: int) -> None:
        buffer[target, :, :used] = buffer[source, :, :used]

    def clear_row(self, buffer: Buffer, row: int) -> None:
        buffer[row] = 0


def physical_memory() -> int | None:
    """Bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def failure(error: Exception, what: str, reason: str) -> BackendError:
    """The error to raise for a library's, whose ``reason`` is one line; with a hint where memory
    was short."""
    if isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in SHORT):
        return DeviceMemoryError(
            f"{what}, out of memory ({reason}); give fewer prompts at once or shorter ones, "
            "or lower kv_keep"
        )
    return BackendError(f"{what}: {reason}")
