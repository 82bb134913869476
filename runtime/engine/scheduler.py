"""The engine's thread: takes requests from a queue into the batch, one decode step of all running
requests after the other. A request joins or leaves between two steps."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from lvlm.core.errors import (
    BackendError,
    EngineClosedError,
    LvlmError,
    QueueFullError,
    RequestTimeout,
)
from lvlm.core.forks import Home, orphan_in_children
from lvlm.runtime.engine.batch import Batch
from lvlm.runtime.engine.chunks import STEPS_BETWEEN, ChunkPace
from lvlm.runtime.engine.faults import described
from lvlm.runtime.engine.image_cache import ImageCache
from lvlm.runtime.engine.reading import Reading, ReadingInPieces
from lvlm.runtime.engine.request import Request
from lvlm.runtime.engine.stats import EngineStats
from lvlm.runtime.engine.worker import Beside, Inline, Worker

log = logging.getLogger(__name__)


@dataclass
class Prefilling:
    """A request whose prompt is being read, by a worker or between steps."""

    reading: Reading
    logits: Future[np.ndarray]
    stopped: bool = False

    @property
    def request(self) -> Request:
        return self.reading.requests[0]

    def read_chunk(self, pace: ChunkPace, *, beside: bool) -> None:
        """Read the next tokens of a prompt that no worker reads. ``beside`` others, which wait for
        theirs, an image is encoded at a time, too."""
        assert isinstance(self.reading, ReadingInPieces)
        tokens = min(pace.tokens(beside=beside), self.reading.left)
        try:
            if self.stopped:
                raise BackendError("nobody waits for the answer any more; the prompt is left")
            if beside and self.reading.images_left:
                self.reading.encode_images(1)
                return
            logits, seconds = self.reading.read(tokens)
        except Exception as error:
            self.logits.set_exception(error)
            return
        pace.read(tokens, seconds)
        if logits is not None:
            self.logits.set_result(logits)

    def stop(self) -> None:
        """Nobody waits for it any more."""
        if not self.stopped:
            self.reading.stop()
        self.stopped = True


class Scheduler:
    """First come, first served: the oldest request takes the next free slot, all have slots alike,
    and every running one gets a token a step; so none starves.

    With a ``pace`` prompts are read in chunks, between decode steps. Without, where the backend can
    (Backend.parallel), a prompt is read on a second thread, beside decode.
    ``submit``, ``wake`` and ``close`` are for any thread, all else is for the engine's own.
    """

    def __init__(
        self, batch: Batch, images: ImageCache, queue_limit: int, pace: ChunkPace | None = None
    ) -> None:
        self.batch, self.images, self.queue_limit = batch, images, queue_limit
        self.pace, self._steps = pace, 0  # decode steps since the last chunk
        self.waiting: deque[Request] = deque()
        self._prefilling: Prefilling | None = None
        self._changed = threading.Condition()
        self._closing: str | None = None  # "now", or "finish" what is there first
        self._home = Home("engine")
        parallel = batch.graphs.backend.parallel and pace is None
        self._worker: Worker = Beside("lvlm-prefill") if parallel else Inline()
        self._thread = threading.Thread(target=self._run, name="lvlm-engine", daemon=True)
        self._thread.start()
        # No thread may be inside a backend when the interpreter goes.
        atexit.register(self.close, finish=False)
        orphan_in_children(self)

    # For any thread

    def check_process(self) -> None:
        """Raises BackendError in a forked child."""
        self._home.check()

    def submit(self, request: Request) -> None:
        """Raises QueueFullError, EngineClosedError."""
        with self._changed:
            if self._closing is not None:
                raise EngineClosedError("this engine is closed; open the bundle again")
            if len(self.waiting) >= self.queue_limit:
                raise QueueFullError(
                    f"{self.queue_limit} requests are waiting already; try again later, or give "
                    "the engine more slots or a larger queue_limit"
                )
            self.waiting.append(request)
            self.batch.meter.submitted += len(request.group)
            self._changed.notify_all()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def stats(self) -> EngineStats:
        with self._changed:
            waiting = sum(len(request.group) for request in self.waiting)
            running = len(self.batch.running)
            reading = 0 if self._prefilling is None else len(self._prefilling.request.group)
        cache, meter = self.batch.cache, self.batch.meter
        return EngineStats(
            running=running + reading,
            waiting=waiting,
            submitted=meter.submitted,
            answered=meter.answered,
            new_tokens=meter.new_tokens,
            tokens_per_second=meter.tokens_per_second(),
            prompt_tokens=meter.prompt_tokens,
            reused_tokens=meter.reused_tokens,
            image_hits=self.images.hits,
            image_misses=self.images.misses,
            cache_bytes=cache.bytes_allocated,
            cache_bytes_used=sum(cache.bytes_used(place) for place in range(running)),
        )

    def close(self, *, finish: bool) -> None:
        """No more requests. Those there are finished first, or fail with EngineClosedError."""
        self.stop(finish=finish)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def stop(self, *, finish: bool = False) -> None:
        """Stop, as ``close`` does, but without waiting for the end."""
        with self._changed:
            if self._closing != "now":
                self._closing = "finish" if finish else "now"
            self._changed.notify_all()

    def orphan(self) -> None:
        """Fail in a forked child, where the engine's thread is not: whoever held the lock is
        gone."""
        self._changed = threading.Condition()
        self._closing = "now"
        atexit.unregister(self.close)

    # The engine's thread

    def _run(self) -> None:
        error: LvlmError = EngineClosedError("the engine was closed before the answer")
        try:
            while self._wait():
                self._sweep()
                self._take_prefilled()
                self._admit()
                self._read_chunk()
                self._take_prefilled()  # one that was read on this thread
                self._step()
        except Exception as bug:  # nobody may wait for ever
            error = BackendError(f"the engine stopped ({described(bug)}); open it again")
            log.exception("the engine stopped")
        finally:
            with self._changed:
                self._closing = "now"
                left = [*_members(self.waiting), *self.batch.running]
                self.waiting.clear()
            if self._prefilling is not None:
                left.extend(self._prefilling.request.group)
            for request in left:
                request.caller.fail(error)
            if self._prefilling is not None:
                self._prefilling.stop()
            self._worker.close()
            self._free()
            atexit.unregister(self.close)

    def _free(self) -> None:
        """Give back the memory, even if someone keeps the closed engine."""
        self._prefilling = None
        self.batch.free()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when the engine is to end."""
        with self._changed:
            while True:
                idle = not (self.waiting or self.batch.running or self._prefilling)
                if self._closing == "now" or (self._closing == "finish" and idle):
                    return False
                reading = self._prefilling
                # With a pace its next chunk is due, or the steps before it
                ready = reading is not None and (self.pace or reading.logits.done())
                if self.batch.running or ready or (self.waiting and not self._prefilling):
                    return True
                if any(request.caller.done for request in self._all()):
                    return True
                if self._prefilling is not None and self._unwanted(self._prefilling):
                    return True
                deadlines = [r.deadline for r in self._all() if r.deadline is not None]
                until = min(deadlines, default=None)
                pause = None if until is None else until - time.perf_counter()
                if pause is not None and pause <= 0:
                    return True
                self._changed.wait(None if pause is None else min(pause, threading.TIMEOUT_MAX))

    @staticmethod
    def _unwanted(prefilling: Prefilling) -> bool:
        ended = all(request.caller.done for request in prefilling.request.group)
        return ended and not prefilling.stopped

    def _all(self) -> list[Request]:
        prefilling = self._prefilling.request.group if self._prefilling is not None else []
        live = [r for r in prefilling if not r.caller.done]
        return [*_members(self.waiting), *live, *self.batch.running]

    def _sweep(self) -> None:
        """End what is over its time, and drop what its caller has ended."""
        now = time.perf_counter()
        with self._changed:
            everyone = self._all()
        for request in everyone:
            if request.deadline is not None and now >= request.deadline:
                request.caller.fail(
                    RequestTimeout("the request's timeout is over; give it more, or ask less")
                )
        with self._changed:
            self.waiting = deque(r for w in self.waiting if (r := _wanted(w)) is not None)
        if self._prefilling is not None and self._unwanted(self._prefilling):
            self._prefilling.stop()
        self.batch.settle()

    def _admit(self) -> None:
        """The oldest request that waits takes a slot, or one for each of its answers, if they are
        free."""
        while self.waiting and self.batch.slots.room(len(self.waiting[0].group)):
            request = self.waiting[0]
            request.leave_queue()
            reading = self.batch.admit([request])
            if reading is not None and self.pace is not None:
                self._prefilling = Prefilling(reading, Future())
                self._steps = STEPS_BETWEEN  # nothing was read between the last ones
            elif reading is not None:
                logits = self._worker.submit(reading.run, self.wake)
                self._prefilling = Prefilling(reading, logits)
            with self._changed:  # only now: whatever goes wrong in between, it is told
                self.waiting.popleft()

    def _read_chunk(self) -> None:
        """The next tokens of the prompt that is being read, if those that run had their steps."""
        reading, beside = self._prefilling, bool(self.batch.running)
        if self.pace is None or reading is None or reading.logits.done():
            return
        if beside and self._steps < STEPS_BETWEEN and not reading.stopped:
            return
        reading.read_chunk(self.pace, beside=beside)
        self._steps = 0

    def _step(self) -> None:
        """One more token of every running request."""
        if not self.batch.running:
            return
        began = time.perf_counter()
        self.batch.step()
        self._steps += 1
        if self.pace is not None:
            self.pace.stepped(time.perf_counter() - began)

    def _take_prefilled(self) -> None:
        """A prompt that has been read becomes a running request, with its first token."""
        done = self._prefilling
        if done is None or not done.logits.done():
            return
        places = self.batch.begin(done.reading, done.logits.result)
        self._prefilling = None
        self.batch.choose(places)


def _members(requests: Iterable[Request]) -> list[Request]:
    return [member for request in requests for member in request.group]


def _wanted(request: Request) -> Request | None:
    """What is left of a request that waits when answers that nobody waits for are gone; None:
    nothing."""
    left = [member for member in request.group if not member.caller.done]
    if not left:
        return None
    left[0].forks = left[1:]
    return left[0]
