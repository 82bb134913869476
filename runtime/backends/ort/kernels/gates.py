"""Gates of the CPU kernels: a graph that has some of them can be held between two of its nodes."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from lvlm.core.errors import BackendError
from lvlm.runtime.backends.ort.kernels.kernel_library import BUILD


class KernelGate:
    """A gate (backends.Gate) of the library at ``path``, which the sessions have loaded.

    Raises BackendError for a library from before there were gates.
    """

    def __init__(self, path: Path) -> None:
        self._library = _library(path)
        self._gate = ctypes.c_void_p(self._library.lvlm_gate_new())
        # At the interpreter's end it is left: in a forked child who waits at it is not there
        weakref.finalize(self, self._library.lvlm_gate_free, self._gate).atexit = False

    @contextmanager
    def within(self) -> Iterator[None]:
        self._library.lvlm_gate_enter(self._gate)
        try:
            yield
        finally:
            self._library.lvlm_gate_leave(self._gate)

    def open(self) -> None:
        self._library.lvlm_gate_open(self._gate)

    def shut(self) -> bool:
        return bool(self._library.lvlm_gate_shut(self._gate))


def kernels_made(path: Path | None) -> int:
    """Nodes that this thread has made kernels for; None: there are no kernels. Raises as
    KernelGate."""
    return 0 if path is None else int(_library(path).lvlm_kernels_made())


@cache
def _library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    try:
        library.lvlm_gate_new.restype = ctypes.c_void_p
        library.lvlm_gate_shut.restype = ctypes.c_bool
        library.lvlm_kernels_made.restype = ctypes.c_size_t
    except AttributeError:
        raise BackendError(
            f"the CPU kernels in {path} are older than this lvlm; build them again ({BUILD})"
        ) from None
    return library
