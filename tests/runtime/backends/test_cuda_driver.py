"""The layer between the TensorRT backends and the NVIDIA driver's library."""

# ruff: noqa: N802, N815 - functions of CUDA

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lvlm.core import nvidia
from lvlm.core.errors import BackendError, ParameterError
from lvlm.runtime.backends import open_backend
from lvlm.runtime.backends.trt.cuda_driver import CudaDriver

GPU = nvidia.Gpu("Fake", 87, 1 << 33, True)


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT itself: CUDA is reached through the driver's library."""
    monkeypatch.setattr(nvidia, "driver", lambda: nvidia.NvidiaDriver((13, 0), (GPU,)))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeCuda())
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"tensorrt cannot be .*\[tensorrt\]"):
        open_backend("tensorrt")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "driver", lambda: nvidia.NvidiaDriver((13, 0), ()))
    with pytest.raises(BackendError, match="the NVIDIA driver shows no GPU; see nvidia-smi"):
        open_backend("tensorrt-rtx")


def test_threads_are_for_cpus() -> None:
    with pytest.raises(ParameterError, match="device tensorrt takes no number of threads"):
        open_backend("tensorrt", threads=2)


class FakeCuda:
    """libcuda over the host's memory: what is called, by threads, and calls that are refused.

    Arguments are taken as ctypes would hand them over: a Python integer would lose its upper half.
    """

    def __init__(self, **refused: int) -> None:
        self.refused, self.calls = refused, list[tuple[str, int]]()
        self.memory: dict[int, Any] = {}
        self.queue: list[Callable[[], None]] = []
        self.recorded: list[Callable[[], None]] | None = None

    def __getattr__(self, name: str) -> Any:
        perform = type(self).__dict__.get(f"do_{name}")

        def call(*arguments: Any) -> int:
            assert not [a for a in arguments if isinstance(a, int)], name
            self.calls.append((name, threading.get_ident()))
            if name in self.refused:
                return self.refused[name]
            values = [getattr(a, "_obj", a) for a in arguments]  # of byref
            if perform is not None:
                perform(self, *values)
            return 0

        return call

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def do_cuGetErrorName(self, status: Any, name: Any) -> None:
        name.value = {2: b"CUDA_ERROR_OUT_OF_MEMORY", 719: b"CUDA_ERROR_LAUNCH_FAILED"}[
            status.value
        ]

    def do_cuStreamCreate(self, stream: Any, flags: Any) -> None:
        assert flags.value == 1
        stream.value = STREAM

    def do_cuMemGetInfo_v2(self, free: Any, total: Any) -> None:
        free.value, total.value = 5 << 32, 9 << 32

    def do_cuMemAlloc_v2(self, address: Any, size: Any) -> None:
        block = ctypes.create_string_buffer(size.value)
        address.value = ctypes.addressof(block)
        self.memory[address.value] = block

    do_cuMemAllocHost_v2 = do_cuMemAlloc_v2

    def do_cuMemFree_v2(self, address: Any) -> None:
        del self.memory[address.value]

    do_cuMemFreeHost = do_cuMemFree_v2

    def do_cuMemcpyHtoDAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> None:
        self._put(stream, lambda: ctypes.memmove(to.value, source.value, size.value))

    do_cuMemcpyDtoHAsync_v2 = do_cuMemcpyDtoDAsync_v2 = do_cuMemcpyHtoDAsync_v2

    def do_cuMemsetD8Async(self, to: Any, value: Any, size: Any, stream: Any) -> None:
        self._put(stream, lambda: ctypes.memset(to.value, value.value, size.value))

    def do_cuStreamSynchronize(self, stream: Any) -> None:
        assert stream.value == STREAM
        while self.queue:
            self.queue.pop(0)()

    def do_cuStreamBeginCapture_v2(self, stream: Any, mode: Any) -> None:
        assert (stream.value, mode.value) == (STREAM, 1)
        self.recorded = []

    def do_cuStreamEndCapture(self, stream: Any, graph: Any) -> None:
        assert stream.value == STREAM
        graph.value, self.graph, self.recorded = GRAPH, self.recorded, None

    def do_cuGraphInstantiateWithFlags(self, made: Any, graph: Any, flags: Any) -> None:
        assert (graph.value, flags.value) == (GRAPH, 0)
        made.value = GRAPH + 1

    def do_cuGraphLaunch(self, graph: Any, stream: Any) -> None:
        assert (graph.value, stream.value) == (GRAPH + 1, STREAM)
        self.queue += self.graph or []

    def _put(self, stream: Any, work: Callable[[], object]) -> None:
        assert stream.value == STREAM
        (self.queue if self.recorded is None else self.recorded).append(lambda: (work(), None)[1])


STREAM, GRAPH = (7 << 40) + 8, (9 << 40) + 16  # as wide as addresses are


def opened(cuda: FakeCuda) -> CudaDriver:
    def load(name: str) -> Any:
        assert name == nvidia.LIBRARY
        return cuda

    return CudaDriver(nvidia.NvidiaDriver((13, 1), (GPU,)), load)


def test_memory_and_copies_in_the_streams_order() -> None:
    cuda = FakeCuda()
    driver = opened(cuda)
    assert (driver.device, driver.stream, driver.free_memory()) == (GPU, STREAM, 5 << 32)
    device, second = driver.allocate(16), driver.allocate(16)
    assert device is not None
    assert second is not None
    host = driver.allocate_pinned(16)
    ctypes.memmove(host, bytes(range(16)), 16)
    driver.upload(device, host, 16)
    driver.copy(second, device + 8, 8)
    driver.clear(second + 2, 3)
    driver.download(host, second, 8)
    assert ctypes.string_at(host, 16) == bytes(range(16))  # nothing has run
    driver.synchronize()
    assert ctypes.string_at(host, 8) == bytes([8, 9, 0, 0, 0, 13, 14, 15])
    driver.free(device)
    driver.free_pinned(host)
    assert set(cuda.memory) == {second}
    assert cuda.names()[:4] == [
        "cuInit",
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuCtxSetCurrent",
    ]


def test_the_context_is_every_threads_own() -> None:
    """An engine's thread is another than the one that loaded it."""
    cuda = FakeCuda()
    driver = opened(cuda)
    driver.synchronize()
    thread = threading.Thread(target=lambda: (driver.synchronize(), driver.synchronize()))
    thread.start()
    thread.join()
    entered = [ident for name, ident in cuda.calls if name == "cuCtxSetCurrent"]
    assert len(entered) == 2
    assert entered[0] == threading.get_ident() != entered[1]


def test_a_graph_repeats_what_was_put_into_the_stream() -> None:
    cuda = FakeCuda()
    driver = opened(cuda)
    device = driver.allocate(4)
    assert device is not None
    graph = driver.capture(lambda: driver.clear(device, 4))
    for _ in range(2):
        ctypes.memset(device, 1, 4)
        driver.synchronize()
        assert ctypes.string_at(device, 4) == b"\1\1\1\1"
        driver.launch(graph)
        driver.synchronize()
        assert ctypes.string_at(device, 4) == b"\0\0\0\0"
    driver.free_graph(graph)
    assert cuda.names().count("cuGraphDestroy") == cuda.names().count("cuGraphExecDestroy") == 1
    cuda.calls.clear()
    with pytest.raises(ZeroDivisionError):
        driver.capture(lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    assert cuda.names() == ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphDestroy"]


def test_what_fails_is_one_line() -> None:
    cuda = FakeCuda()
    driver = opened(cuda)
    assert driver.allocate(1 << 70) is None
    cuda.refused = {"cuMemAlloc_v2": 2}
    assert driver.allocate(100) is None
    cuda.refused = dict.fromkeys(("cuMemAlloc_v2", "cuStreamSynchronize", "cuMemFree_v2"), 719)
    with pytest.raises(BackendError, match=r"CUDA failed \(CUDA_ERROR_LAUNCH_FAILED of cuMemAll"):
        driver.allocate(100)
    with pytest.raises(BackendError, match=r"of cuStreamSynchronize\); where it does so again"):
        driver.synchronize()
    driver.free(256)  # at exit: nobody is told
    cuda.refused["cuGetErrorName"] = 1
    with pytest.raises(BackendError, match="error 719 of"):
        driver.synchronize()
    cuda.refused = {"cuGraphInstantiateWithFlags": 2}
    with pytest.raises(BackendError, match="CUDA_ERROR_OUT_OF_MEMORY of cuGraphInstantiateWithFl"):
        driver.capture(lambda: None)
    assert "cuGraphDestroy" in cuda.names()


class Cuda:
    """libcuda over the host's memory: what is called, and one function that is refused."""

    def __init__(self, refused: str = "") -> None:
        self.refused, self.calls = refused, list[str]()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self.refused:
                return 999
            if name == "cuMemcpyDtoD_v2":
                target, source, size = (a.value for a in arguments)
                ctypes.memmove(target, source, size)
            elif name == "cuMemsetD8_v2":
                target, value, size = (a.value for a in arguments)
                ctypes.memset(target, value, size)
            return 0

        return call


def test_memory_is_moved_within_the_device() -> None:
    """In the context that CUDA's runtime has, which is given back whatever happens."""
    memory = np.arange(12, dtype=np.uint8)
    start, cuda = memory.ctypes.data, Cuda()

    def load(name: str) -> Any:
        assert name == nvidia.LIBRARY
        return cuda

    nvidia.copy_on_device(start + 8, start, 4, load)
    assert memory.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    around = ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    assert cuda.calls == [
        *around,
        *("cuMemcpyDtoD_v2", "cuCtxSynchronize", "cuDevicePrimaryCtxRelease_v2"),
    ]
    nvidia.clear_on_device(start + 1, 5, load)
    assert memory.tolist() == [0, 0, 0, 0, 0, 0, 6, 7, 0, 1, 2, 3]
    cuda = Cuda("cuMemsetD8_v2")
    with pytest.raises(BackendError, match=r"refuses cuMemsetD8_v2 \(error 999\)"):
        nvidia.clear_on_device(start, 5, load)
    assert cuda.calls == [*around, "cuMemsetD8_v2", "cuDevicePrimaryCtxRelease_v2"]
