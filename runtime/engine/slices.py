"""Work on a thread of its own that goes on only while its owner lets it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from lvlm.runtime.backends import Gate

T = TypeVar("T")


class Slices(Generic[T]):
    """Work that runs graphs, in slices of time: between them it is held at a gate, so that its
    owner's graphs have the device. For one thread, but for ``release``.

    Args:
        work: what is done; its result is ``result``'s.
        gate: what its graphs are held at.
    """

    def __init__(self, work: Callable[[], T], gate: Gate) -> None:
        self._work, self._gate = work, gate
        self.seconds = 0.0  # worked so far
        self._result: T | None = None
        self._error: Exception | None = None
        self._released, self._done = False, threading.Event()
        self._thread = threading.Thread(target=self._run, name="lvlm-reading", daemon=True)
        self._thread.start()

    def go_on(self, seconds: float | None) -> bool:
        """Work for so long, or a little longer, None: to the end; True when it is done."""
        began = time.perf_counter()
        self._gate.open()
        done = self._done.wait(seconds)
        if not (done or self._released):
            self._gate.shut()
            if self._released:  # meanwhile
                self._gate.open()
        self.seconds += time.perf_counter() - began
        return self._done.is_set()

    def join(self) -> None:
        """Return when its thread has ended, after ``release`` or its end."""
        self._thread.join()

    def result(self) -> T:
        """The outcome of the work, once it is done; raises what that raised."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def release(self) -> None:
        """It is held no more: whoever gives it up waits for its end."""
        self._released = True
        self._gate.open()

    def _run(self) -> None:
        try:
            with self._gate.within():
                self._result = self._work()
        except Exception as error:
            self._error = error
        finally:
            self._done.set()
