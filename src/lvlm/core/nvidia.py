"""Facts about the NVIDIA driver and its GPUs, through the driver's own library alone.

No CUDA toolkit and no Python binding is needed, and none is imported.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from lvlm.core.errors import BackendError

LIBRARY = "libcuda.so.1"
MAJOR, MINOR, INTEGRATED = 75, 76, 18  # CUdevice_attribute


NO_DEVICE = 100  # what cuInit gives where it finds no GPU


class NoGpuError(BackendError):
    """This machine has no NVIDIA driver, or no GPU for it: nothing is broken."""


@dataclass(frozen=True)
class Gpu:
    """sm is 10 · major + minor of the compute capability; memory in bytes, shared with the CPU on
    an integrated GPU (Jetson)."""

    name: str
    sm: int
    memory: int
    integrated: bool


@dataclass(frozen=True)
class NvidiaDriver:
    """cuda: the newest CUDA version that the driver serves, as (major, minor)."""

    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]


def driver(load: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> NvidiaDriver:
    """Ask the driver. Raises BackendError if there is none, or none that starts."""
    try:
        cuda = load(LIBRARY)
    except OSError:
        raise NoGpuError(
            f"no NVIDIA driver ({LIBRARY} is not found); install the driver, or, in a container, "
            "start it with the NVIDIA runtime (--gpus all)"
        ) from None
    if status := cuda.cuInit(0):
        what = f"the NVIDIA driver does not start (cuInit gives {status})"
        if status == NO_DEVICE:
            raise NoGpuError(f"{what}; there is no GPU it can use")
        raise BackendError(f"{what}; is it the one of this kernel?")
    version, count = ctypes.c_int(), ctypes.c_int()
    _call(cuda, "cuDriverGetVersion", ctypes.byref(version))
    _call(cuda, "cuDeviceGetCount", ctypes.byref(count))
    gpus = tuple(_gpu(cuda, index) for index in range(count.value))
    return NvidiaDriver((version.value // 1000, version.value % 1000 // 10), gpus)


def copy_on_device(
    target: int, source: int, size: int, load: Callable[[str], ctypes.CDLL] = ctypes.CDLL
) -> None:
    """Copy ``size`` bytes on the first GPU and wait."""
    into, old, count = ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(size)
    _on_device(load(LIBRARY), "cuMemcpyDtoD_v2", into, old, count)


def clear_on_device(
    target: int, size: int, load: Callable[[str], ctypes.CDLL] = ctypes.CDLL
) -> None:
    """Write ``size`` bytes of zeros on the first GPU and wait."""
    into, zero, count = ctypes.c_uint64(target), ctypes.c_ubyte(0), ctypes.c_size_t(size)
    _on_device(load(LIBRARY), "cuMemsetD8_v2", into, zero, count)


def _on_device(cuda: ctypes.CDLL, function: str, *arguments: object) -> None:
    """Call in the context that CUDA's runtime uses, on the first GPU, and wait."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _call(cuda, "cuDeviceGet", ctypes.byref(device), 0)
    _call(cuda, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        _call(cuda, "cuCtxSetCurrent", context)
        _call(cuda, function, *arguments)
        _call(cuda, "cuCtxSynchronize")
    finally:
        _call(cuda, "cuDevicePrimaryCtxRelease_v2", device)


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    _call(cuda, "cuDeviceGet", ctypes.byref(device), index)
    _call(cuda, "cuDeviceGetName", name, 256, device)
    _call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    values = []
    for attribute in (MAJOR, MINOR, INTEGRATED):
        value = ctypes.c_int()
        _call(cuda, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        values.append(value.value)
    major, minor, integrated = values
    return Gpu(name.value.decode(), 10 * major + minor, memory.value, bool(integrated))


def _call(cuda: ctypes.CDLL, function: str, *arguments: object) -> None:
    if status := getattr(cuda, function)(*arguments):
        raise BackendError(f"the NVIDIA driver refuses {function} (error {status}); restart it")
