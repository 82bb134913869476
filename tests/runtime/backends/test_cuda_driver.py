"""The layer between the TensorRT backends and CUDA's bindings, and what if those are missing."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lvlm.core import nvidia
from lvlm.core.errors import BackendError, ParameterError
from lvlm.runtime.backends import open_backend
from lvlm.runtime.backends.trt.driver import CudaDriver

GPU = nvidia.Gpu("Fake", 87, 1 << 33, True)


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "driver", lambda: nvidia.NvidiaDriver((13, 0), (GPU,)))
    with monkeypatch.context() as patch:
        for name in ("cuda.bindings.runtime", "cuda.cudart"):
            patch.setitem(sys.modules, name, None)
        with pytest.raises(
            BackendError, match=r"cuda.bindings.runtime cannot .*pip install cuda-b"
        ):
            open_backend("tensorrt")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", Bindings())
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


class Bindings:
    """cuda.bindings.runtime: each call is answered by its name, (0, value) if nothing else."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self, **answers: tuple[Any, ...]) -> None:
        self.answers = {"cudaRuntimeGetVersion": (Error(0), 13000)} | answers
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            return self.answers.get(name, (Error(0), 256))

        return call


class Error(int):
    @property
    def name(self) -> str:
        return {0: "cudaSuccess", 2: "cudaErrorMemoryAllocation"}.get(self, "cudaErrorUnknown")


def test_the_real_driver_layer() -> None:
    """Arguments and answers of the bindings; a call that fails is one line."""
    bindings = Bindings(cudaMemGetInfo=(Error(0), 5, 9), cudaMalloc=(Error(2), None))
    driver = CudaDriver(bindings, nvidia.NvidiaDriver((13, 1), (GPU,)))
    assert driver.device is GPU
    assert driver.free_memory() == 5
    assert driver.allocate(100) is None
    assert bindings.calls[-1] == ("cudaGetLastError",)
    bindings.calls.clear()
    driver.upload(1, 2, 3)
    driver.download(1, 2, 3)
    assert bindings.calls == [
        ("cudaMemcpyAsync", 1, 2, 3, 1, 256),
        ("cudaMemcpyAsync", 1, 2, 3, 2, 256),
    ]
    bindings.calls.clear()
    assert driver.capture(lambda: None) == 256
    assert [call[0] for call in bindings.calls] == [
        *("cudaStreamBeginCapture", "cudaStreamEndCapture"),
        *("cudaGraphInstantiate", "cudaGraphDestroy"),
    ]
    bindings.calls.clear()
    with pytest.raises(ZeroDivisionError):
        driver.capture(lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    assert ("cudaStreamEndCapture", 256) in bindings.calls  # the stream is usable again
    bindings.answers["cudaStreamSynchronize"] = (Error(719),)
    with pytest.raises(BackendError, match=r"CUDA failed \(cudaErrorUnknown\)"):
        driver.synchronize()


def test_a_driver_that_is_too_old() -> None:
    with pytest.raises(BackendError, match=r"serves CUDA 12.4, cuda-bindings is for CUDA 13; upd"):
        CudaDriver(Bindings(), nvidia.NvidiaDriver((12, 4), (GPU,)))


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
