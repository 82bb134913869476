"""CUDA as the TensorRT backends use it: memory, one stream, captured graphs.

``Driver`` is all that they ask for, so that host memory can stand in for a GPU's in tests. The
bindings are imported by ``open_driver``, not before.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lvlm.core import nvidia
from lvlm.core.errors import BackendError, DeviceMemoryError
from lvlm.core.installing import require

BINDINGS = "pip install cuda-bindings of the CUDA version that nvidia-smi shows"


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
    seen = nvidia.driver()
    if not seen.gpus:
        raise BackendError(
            "the NVIDIA driver shows no GPU; see nvidia-smi and CUDA_VISIBLE_DEVICES, or use "
            "--device cpu"
        )
    return CudaDriver(_bindings(), seen)


def _bindings() -> Any:
    try:
        return require("cuda.bindings.runtime", BINDINGS)
    except BackendError:
        with contextlib.suppress(ImportError):
            return importlib.import_module("cuda.cudart")  # its name before CUDA 12.6
        raise


class CudaDriver:
    """``Driver`` over NVIDIA's own bindings; ``runtime`` is cuda.bindings.runtime."""

    def __init__(self, runtime: Any, seen: nvidia.NvidiaDriver) -> None:
        needed = int(_ask(runtime.cudaRuntimeGetVersion()))
        # Versions within a major one work with each other.
        if seen.cuda[0] < needed // 1000:
            raise BackendError(
                "the NVIDIA driver serves CUDA {}.{}, cuda-bindings is for CUDA {}; update the "
                "driver, or install cuda-bindings and TensorRT for CUDA {}".format(
                    *seen.cuda, needed // 1000, seen.cuda[0]
                )
            )
        self.runtime, self.device = runtime, seen.gpus[0]
        self._stream = _ask(runtime.cudaStreamCreateWithFlags(1))  # apart from the default stream
        self.stream = int(self._stream)

    def free_memory(self) -> int:
        free, _ = _ask(self.runtime.cudaMemGetInfo())
        return int(free)

    def allocate(self, size: int) -> int | None:
        if size > sys.maxsize:
            return None
        error, address = self.runtime.cudaMalloc(size)
        if _name(error) == "cudaErrorMemoryAllocation":
            self.runtime.cudaGetLastError()  # else the next call reports it again
            return None
        return int(_ask((error, address)))

    def free(self, address: int) -> None:
        self.runtime.cudaFree(address)  # may come at exit, when the driver has gone already

    def allocate_pinned(self, size: int) -> int:
        return int(_ask(self.runtime.cudaMallocHost(size)))

    def free_pinned(self, address: int) -> None:
        self.runtime.cudaFreeHost(address)

    def upload(self, device: int, host: int, size: int) -> None:
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        _ask(self.runtime.cudaMemcpyAsync(device, host, size, kind, self._stream))

    def download(self, host: int, device: int, size: int) -> None:
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        _ask(self.runtime.cudaMemcpyAsync(host, device, size, kind, self._stream))

    def copy(self, target: int, source: int, size: int) -> None:
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        _ask(self.runtime.cudaMemcpyAsync(target, source, size, kind, self._stream))

    def clear(self, device: int, size: int) -> None:
        _ask(self.runtime.cudaMemsetAsync(device, 0, size, self._stream))

    def synchronize(self) -> None:
        _ask(self.runtime.cudaStreamSynchronize(self._stream))

    def capture(self, enqueue: Callable[[], None]) -> int:
        # Other threads may allocate meanwhile; this one may not.
        mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _ask(self.runtime.cudaStreamBeginCapture(self._stream, mode))
        try:
            enqueue()
        except BaseException:
            self.runtime.cudaStreamEndCapture(self._stream)
            self.runtime.cudaGetLastError()
            raise
        try:
            graph = _ask(self.runtime.cudaStreamEndCapture(self._stream))
            executable = _ask(self.runtime.cudaGraphInstantiate(graph, 0))
        except BackendError:
            self.runtime.cudaGetLastError()
            raise
        self.runtime.cudaGraphDestroy(graph)  # the executable graph has its own copy
        return int(executable)

    def launch(self, graph: int) -> None:
        _ask(self.runtime.cudaGraphLaunch(graph, self._stream))

    def free_graph(self, graph: int) -> None:
        self.runtime.cudaGraphExecDestroy(graph)


def _ask(answer: tuple[Any, ...]) -> Any:
    """The values of a CUDA call's ``answer``, whose first is its error."""
    error, *values = answer
    if int(error):
        raise BackendError(
            f"CUDA failed ({_name(error)}); where it does so again, restart the program and see "
            "nvidia-smi for what else uses the GPU"
        )
    return values[0] if len(values) == 1 else tuple(values)


def _name(error: Any) -> str:
    """cudaErrorMemoryAllocation, say."""
    return str(getattr(error, "name", error))
