"""The prompt that is being read, and how it ends while the engine's thread is inside its graph."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from lvlm.core.errors import BackendError, RequestTimeout
from lvlm.runtime.engine.chunks import ChunkPace
from lvlm.runtime.engine.reading import Reading
from lvlm.runtime.engine.request import Request


class Prefilling:
    """A request whose prompt is read by the engine's thread; ``stop`` is for any."""

    def __init__(self, reading: Reading) -> None:
        self.reading, self.stopped = reading, False

    @property
    def request(self) -> Request:
        return self.reading.requests[0]

    @property
    def unwanted(self) -> bool:
        """True once nobody waits for it any more."""
        return all(request.caller.done for request in self.request.group)

    def go_on(self, pace: ChunkPace, *, beside: bool) -> np.ndarray | None:
        """Read on, by Reading.go_on. Raises BackendError once it has been stopped."""
        if self.stopped:
            raise BackendError("nobody waits for the answer any more; the prompt is left")
        return self.reading.go_on(pace, beside=beside)

    def stop(self) -> None:
        """Leave it: at the next node of the graph that is run, where the backend can."""
        if not self.stopped:
            self.stopped = True  # first: a run that has not begun may not know yet
            self.reading.stop()


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
