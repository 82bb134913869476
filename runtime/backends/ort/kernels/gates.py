"""Gates of the CPU kernels: a graph that has some of them can be held between two of its nodes."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lvlm.core.errors import BackendError
from lvlm.runtime.backends.ort.kernels.kernel_library import BUILD


class KernelGate:
    """A gate (backends.Gate) of the library at ``path``, which the sessions have loaded.

    Raises BackendError for a library from before there were gates.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        try:
            self._library.lvlm_gate_new.restype = ctypes.c_void_p
        except AttributeError:
            raise BackendError(
                f"the CPU kernels in {path} are older than this lvlm; build them again ({BUILD})"
            ) from None
        self._gate = ctypes.c_void_p(self._library.lvlm_gate_new())
        weakref.finalize(self, self._library.lvlm_gate_free, self._gate)

    @contextmanager
    def within(self) -> Iterator[None]:
        self._library.lvlm_gate_enter(self._gate)
        try:
            yield
        finally:
            self._library.lvlm_gate_leave(self._gate)

    def open(self) -> None:
        self._library.lvlm_gate_open(self._gate)

    def shut(self) -> None:
        self._library.lvlm_gate_shut(self._gate)
