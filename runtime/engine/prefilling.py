"""The prompt that is being read, and how it ends while the engine's thread is inside its graph."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from lvlm.core.errors import BackendError, RequestTimeout
from lvlm.runtime.backends import Gate
from lvlm.runtime.engine.chunks import ChunkPace
from lvlm.runtime.engine.reading import Reading
from lvlm.runtime.engine.request import Request
from lvlm.runtime.engine.slices import Slices


class Prefilling:
    """A request whose prompt is read by the engine's thread; ``stop`` is for any.

    ``gate``: what its graphs are held at while those that run have their steps, so that it can be
    read at once, in slices of time; None: it is read in such pieces as it can be.
    """

    def __init__(self, reading: Reading, gate: Gate | None) -> None:
        self.reading, self.gate, self.stopped = reading, gate, False
        self._slices: Slices[np.ndarray] | None = None
        self._before: list[float] = []  # milliseconds of reading without it

    @property
    def request(self) -> Request:
        return self.reading.requests[0]

    @property
    def unwanted(self) -> bool:
        """True once nobody waits for it any more."""
        return all(request.caller.done for request in self.request.group)

    @property
    def in_slices(self) -> bool:
        """True once it is read in slices of time."""
        return self._slices is not None

    def go_on(self, pace: ChunkPace, streams: int, *, queue: bool) -> np.ndarray | None:
        """Read on beside ``streams`` that wait for their next tokens, with a ``queue`` of those
        that wait to be read: the logits after the prompt, None before. Raises BackendError once it
        has been stopped."""
        beside = streams > 0
        if self.stopped:
            self.end()
            raise BackendError("nobody waits for the answer any more; the prompt is left")
        if self._slices is None:
            if self.gate is None or not beside or not pace.measured or self.reading.images_left:
                return self.reading.go_on(pace, beside=beside)
            self._before = [request.prefill_ms for request in self.reading.requests]
            self._slices = Slices(self.reading.run, self.gate)
        seconds = pace.slice_seconds(streams, queue=queue) if beside else None
        if not self._slices.go_on(seconds):
            return None
        logits = self._slices.result()
        for request, before in zip(self.reading.requests, self._before, strict=True):
            request.prefill_ms = before + self._slices.seconds * 1e3  # less the steps between
        return logits

    def stop(self) -> None:
        """Leave it: at the next node of the graph that is run, where the backend can."""
        if not self.stopped:
            self.stopped = True  # first: a run that has not begun may not know yet
            self.reading.stop()
        if (slices := self._slices) is not None:
            slices.release()

    def end(self) -> None:
        """Return when nothing of it runs any more, after ``stop``."""
        if self._slices is not None:
            self._slices.release()
            self._slices.join()


def end_overdue(requests: Iterable[Request]) -> float | None:
    """Tell the callers whose time is over; when the next one's is, on perf_counter's clock."""
    now, later = time.perf_counter(), list[float]()
    for request in requests:
        if request.deadline is None or request.caller.done:
            continue
        if now < request.deadline:
            later.append(request.deadline)
            continue
        request.caller.fail(
            RequestTimeout("the request's timeout is over; give it more, or ask less")
        )
    return min(later, default=None)


@contextmanager
def deadlines_watched(
    requests: Callable[[], Iterable[Request]], told: Callable[[], None]
) -> Iterator[None]:
    """Meanwhile a thread of its own ends requests when their time is over, and then calls ``told``,
    if there is one that has a deadline."""
    until = end_overdue(requests())
    if until is None:
        yield
        return
    left = threading.Event()

    def watch(until: float | None) -> None:
        while until is not None:
            pause = min(max(0.0, until - time.perf_counter()), threading.TIMEOUT_MAX)
            if left.wait(pause):
                return
            until = end_overdue(requests())
            told()

    threading.Thread(target=watch, args=(until,), name="lvlm-deadlines", daemon=True).start()
    try:
        yield
    finally:
        left.set()  # without waiting: whom it tells may be closing the engine
