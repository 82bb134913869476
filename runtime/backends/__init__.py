"""Backends run graphs over bound buffers; one file each, named as ``load(device=…)`` takes it, with
underscores for dashes."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lvlm.core.discovery import added, loaded, names, nearest
from lvlm.runtime.options.option_kinds import integer, read_value

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy as np

    from lvlm.runtime.bundle.manifest import Manifest  # whose policies count with numpy

Buffer = Any  # what a backend allocates: memory on its device

# Output int64 [B] that a decode graph may give besides the manifest's: of every row the index of
# the largest logit, the lowest where several are as large; -1 where not all are finite
BEST = "best"

# What people call devices
MEANT = {
    **dict.fromkeys(("gpu", "nvidia", "cuda:0"), "cuda"),
    **dict.fromkeys(("trt", "ort-trt"), "tensorrt"),
    **dict.fromkeys(("rtx", "trt-rtx"), "tensorrt-rtx"),
    **dict.fromkeys(("intel", "ov", "openvino-cpu"), "openvino"),
}


class Call(Protocol):
    """A graph with its lasting buffers bound."""

    def __call__(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """Run once: read ``inputs``, fill ``outputs``, write the bound buffers in place.

        Arrays lie in the host's memory, of the ports' types (see ``host_dtype``).
        """

    def stop(self) -> None:
        """Stop from another thread: a run that is on ends soon with an error, and so do later ones.
        Where the device cannot be stopped nothing happens."""


class GraphSession(Protocol):
    """A loaded graph. One that gives BEST has an attribute ``gives_best`` that is true, one that
    can be held at a gate ``gated``: the number of its nodes before which it waits."""

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """Bind buffers that stay the same over many calls; an output may be its input's buffer."""


class Gate(Protocol):
    """A place where the graphs of one thread are held between two of their nodes while another
    thread's have the device; open at first."""

    def within(self) -> AbstractContextManager[None]:
        """A block whose graphs, which this thread runs, can be held."""

    def open(self) -> None:
        """Let it go on."""

    def shut(self) -> bool:
        """Hold it; returns when it waits, True then, or is no longer within."""


class Backend(Protocol):
    """One device.

    For one thread at a time, but for ``Call.stop``.

    static_capacity  its graphs take caches of one length only (kv/static_capacity.py)
    """

    name: str
    static_capacity: bool

    def load(self, folder: Path, manifest: Manifest, name: str) -> GraphSession:
        """The graph ``name`` of the bundle in ``folder``."""

    def gate(self) -> Gate | None:
        """A new gate for the graphs of this backend; None where none can be held."""

    def room(self) -> int | None:
        """Bytes that buffers can never exceed; None where ``allocate`` tells it in time."""

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A buffer of zeros; DeviceMemoryError if there is no room."""

    def rows(self, buffer: Buffer, start: int, stop: int) -> Buffer:
        """Part of a buffer's first axis: the same memory, to be bound like a buffer."""

    def copy_row(self, buffer: Buffer, source: int, target: int, used: int) -> None:
        """Copy within a buffer [rows,heads,slots,d]: one row over another, at least ``used``
        slots."""

    def clear_row(self, buffer: Buffer, row: int) -> None:
        """Clear a row of a buffer [rows,heads,slots,d]: zeros."""


def devices() -> list[str]:
    """The names that ``load(device=…)`` takes."""
    return [*(name.replace("_", "-") for name in names(__name__)), *added(__name__)]


def thread_count(threads: int | None) -> int | None:
    """``threads`` as a number, None as it is. Raises ParameterError for more than there are CPUs:
    threads that have none wait for one another."""
    if threads is None:
        return None
    cpus = os.cpu_count() or 1
    wanted = f"1 to {cpus}, as many CPUs as this machine has"
    return int(read_value("threads", integer(1, cpus, wanted), threads))


def open_backend(device: str, *, threads: int | None = None) -> Backend:
    """The backend for a device name; imports what only that backend needs."""
    threads = thread_count(threads)
    known = devices()
    if device not in known:
        raise nearest("device", device, known, MEANT)
    point = added(__name__).get(device)
    module = (
        loaded(point)
        if point is not None
        else importlib.import_module(f"{__name__}.{device.replace('-', '_')}")
    )
    backend: Backend = module.Backend(threads=threads)
    return backend


def host_dtype(dtype: str) -> str:
    """numpy's name for a port's type; numpy has no bf16, whose bits travel as uint16."""
    return "uint16" if dtype == "bfloat16" else dtype
