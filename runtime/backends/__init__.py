"""Backends run graphs over bound buffers; one file each, named as ``load(device=…)`` takes it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lvlm.runtime.bundle import Graph
from lvlm.runtime.discovery import names, nearest
from lvlm.runtime.errors import BackendError

Buffer = Any  # what a backend allocates: memory on its device


class Call(Protocol):
    """A graph with its lasting buffers bound."""

    def __call__(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """Run once: read ``inputs``, fill ``outputs``, write the bound buffers in place."""


class Session(Protocol):
    """A loaded graph."""

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """Bind buffers that stay the same over many calls; an output may be its input's buffer."""


class Backend(Protocol):
    """One device."""

    name: str

    def load(self, folder: Path, graph: Graph) -> Session: ...

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer: ...


def open_backend(device: str, *, threads: int | None = None) -> Backend:
    """The backend for a device name; imports what only that backend needs."""
    known = names(__name__)
    if device not in known:
        raise nearest("device", device, known)
    module = importlib.import_module(f"{__name__}.{device}")
    backend: Backend = module.Backend(threads=threads)
    return backend


def require(module: str, mend: str) -> Any:
    """Import an optional package of a backend, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(f"{module} cannot be imported ({error}); {mend}") from None
