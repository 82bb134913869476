"""CUDA as the TensorRT backends use it: memory, one stream, captured graphs.

``Driver`` is all that they ask for, so that host memory can stand in for a GPU's in tests.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lvlm.core import nvidia
from lvlm.core.errors import BackendError, DeviceMemoryError


class Driver(Protocol):
    """One GPU and one stream on it. Sizes are in bytes, memory and graphs are addresses.

    Every method raises BackendError with CUDA's reason. Not thread-safe.
    """

    device: nvidia.Gpu
    stream: int

    def free_memory(self) -> int:
        """Bytes of device memory that nobody uses."""

    def allocate(self, size: int) -> int | None:
        """Device memory, aligned to 256 bytes; None if there is not as much."""

    def free(self, address: int) -> None: ...

    def allocate_pinned(self, size: int) -> int:
        """Host memory that copies run from and to without waiting."""

    def free_pinned(self, address: int) -> None: ...

    def upload(self, device: int, host: int, size: int) -> None:
        """Copy to the device, in the stream's order; ``host`` is pinned."""

    def download(self, host: int, device: int, size: int) -> None:
        """Copy from the device, in the stream's order; ``host`` is pinned."""

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy within the device's memory."""

    def clear(self, device: int, size: int) -> None:
        """Fill with zeros, in the stream's order."""

    def synchronize(self) -> None:
        """Wait for everything in the stream."""

    def capture(self, enqueue: Callable[[], None]) -> int:
        """The graph of what ``enqueue`` puts into the stream, none of which runs."""

    def launch(self, graph: int) -> None: ...

    def free_graph(self, graph: int) -> None: ...


class DeviceBuffer:
    """Device memory that is freed with this object. ``purpose`` and ``mend`` are for the error."""

    def __init__(self, driver: Driver, size: int, purpose: str, mend: str) -> None:
        address = driver.allocate(max(1, size))
        if address is None:
            free = driver.free_memory()
            raise DeviceMemoryError(
                f"{purpose} needs {in_mib(size)} of GPU memory, {in_mib(free)} are free; {mend}",
                free,
            )
        self.address, self.nbytes = address, size
        weakref.finalize(self, driver.free, address)


@dataclass(frozen=True)
class DeviceArray:
    """A contiguous array in a buffer, ``offset`` bytes from its start; ``dtype`` is a port's."""

    buffer: DeviceBuffer
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0

    @property
    def address(self) -> int:
        return self.buffer.address + self.offset


class PinnedBlock:
    """Pinned host memory, freed with this object; views of ``array`` must not outlive it."""

    def __init__(self, driver: Driver, size: int) -> None:
        self.address = driver.allocate_pinned(max(1, size))
        memory = (ctypes.c_uint8 * size).from_address(self.address)
        self.array = np.ctypeslib.as_array(memory)
        weakref.finalize(self, driver.free_pinned, self.address)


class CapturedGraph:
    """A CUDA graph of what ``enqueue`` puts into the stream, repeated without its cost on the
    host."""

    def __init__(self, driver: Driver, enqueue: Callable[[], None]) -> None:
        self.driver, self.handle = driver, driver.capture(enqueue)
        weakref.finalize(self, driver.free_graph, self.handle)

    def launch(self) -> None:
        self.driver.launch(self.handle)


def in_mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def open_driver() -> Driver:
    """The first GPU that the driver shows; BackendError says what is missing."""
    from lvlm.runtime.backends.trt.cuda_driver import CudaDriver

    seen = nvidia.driver()
    if not seen.gpus:
        raise BackendError(
            "the NVIDIA driver shows no GPU; see nvidia-smi and CUDA_VISIBLE_DEVICES, or use "
            "--device cpu"
        )
    return CudaDriver(seen)
