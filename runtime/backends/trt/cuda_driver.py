"""``Driver`` over the NVIDIA driver's own library: no CUDA toolkit, no Python binding.

TensorRT computes in the device's primary context, which is this one's, too; it is made current on
every thread that calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Callable
from typing import Any

from lvlm.core import nvidia
from lvlm.core.errors import BackendError

OUT_OF_MEMORY = 2  # CUresult
NON_BLOCKING = 1  # CUstream_flags: apart from the default stream
THREAD_LOCAL = 1  # CUstreamCaptureMode: other threads may allocate meanwhile

Load = Callable[[str], Any]
Address, Handle, Size = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t


class CudaDriver:
    """The first GPU that the driver shows. See Driver."""

    def __init__(self, seen: nvidia.NvidiaDriver, load: Load | None = None) -> None:
        self.cuda, self.device = (load or ctypes.CDLL)(nvidia.LIBRARY), seen.gpus[0]
        self._context, self._threads = Handle(), threading.local()
        device, stream = ctypes.c_int(), Handle()
        self._ask("cuInit", ctypes.c_uint(0))
        self._ask("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        # Never given back: it is TensorRT's, too, as long as the process lives
        self._ask("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(NON_BLOCKING))
        self._stream, self.stream = stream, stream.value or 0

    def free_memory(self) -> int:
        free, total = Size(), Size()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, size: int) -> int | None:
        if size > sys.maxsize:
            return None
        address = Address()
        self._enter()
        status = self.cuda.cuMemAlloc_v2(ctypes.byref(address), Size(size))
        if status == OUT_OF_MEMORY:
            return None
        self._check("cuMemAlloc_v2", status)
        return address.value

    def free(self, address: int) -> None:
        with contextlib.suppress(BackendError):  # at exit the driver may have gone already
            self._call("cuMemFree_v2", Address(address))

    def allocate_pinned(self, size: int) -> int:
        address = Handle()
        self._call("cuMemAllocHost_v2", ctypes.byref(address), Size(size))
        return address.value or 0

    def free_pinned(self, address: int) -> None:
        with contextlib.suppress(BackendError):
            self._call("cuMemFreeHost", Handle(address))

    def upload(self, device: int, host: int, size: int) -> None:
        self._queue("cuMemcpyHtoDAsync_v2", Address(device), Handle(host), Size(size))

    def download(self, host: int, device: int, size: int) -> None:
        self._queue("cuMemcpyDtoHAsync_v2", Handle(host), Address(device), Size(size))

    def copy(self, target: int, source: int, size: int) -> None:
        self._queue("cuMemcpyDtoDAsync_v2", Address(target), Address(source), Size(size))

    def clear(self, device: int, size: int) -> None:
        self._queue("cuMemsetD8Async", Address(device), ctypes.c_ubyte(0), Size(size))

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self._stream)

    def capture(self, enqueue: Callable[[], None]) -> int:
        graph, executable = Handle(), Handle()
        self._call("cuStreamBeginCapture_v2", self._stream, ctypes.c_int(THREAD_LOCAL))
        try:
            enqueue()
        except BaseException:
            # The stream is usable again; what it has captured until here is nobody's
            if not self.cuda.cuStreamEndCapture(self._stream, ctypes.byref(graph)) and graph:
                self.cuda.cuGraphDestroy(graph)
            raise
        self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            made = ctypes.byref(executable)
            self._call("cuGraphInstantiateWithFlags", made, graph, ctypes.c_ulonglong(0))
        finally:
            self.cuda.cuGraphDestroy(graph)  # the executable graph has its own copy
        return executable.value or 0

    def launch(self, graph: int) -> None:
        self._queue("cuGraphLaunch", Handle(graph))

    def free_graph(self, graph: int) -> None:
        with contextlib.suppress(BackendError):
            self._call("cuGraphExecDestroy", Handle(graph))

    def _queue(self, function: str, *arguments: Any) -> None:
        """A call whose last argument is the stream."""
        self._call(function, *arguments, self._stream)

    def _call(self, function: str, *arguments: Any) -> None:
        self._enter()
        self._ask(function, *arguments)

    def _enter(self) -> None:
        """Make the context this thread's, once."""
        if not hasattr(self._threads, "entered"):
            self._ask("cuCtxSetCurrent", self._context)
            self._threads.entered = True

    def _ask(self, function: str, *arguments: Any) -> None:
        self._check(function, getattr(self.cuda, function)(*arguments))

    def _check(self, function: str, status: int) -> None:
        if status:
            raise BackendError(
                f"CUDA failed ({self._name(status)} of {function}); where it does so again, "
                "restart the program and see nvidia-smi for what else uses the GPU"
            )

    def _name(self, status: int) -> str:
        """CUDA_ERROR_OUT_OF_MEMORY, say."""
        name = ctypes.c_char_p()
        if self.cuda.cuGetErrorName(ctypes.c_int(status), ctypes.byref(name)) or not name.value:
            return f"error {status}"
        return name.value.decode()
