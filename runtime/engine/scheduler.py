"""The engine's thread: takes requests from a queue into the batch, one decode step of all running
requests after the other. A request joins or leaves between two steps."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable

from lvlm.core.errors import BackendError, EngineClosedError, LvlmError, QueueFullError
from lvlm.core.forks import Home, orphan_in_children
from lvlm.runtime.backends import Gate
from lvlm.runtime.engine.batch import Batch
from lvlm.runtime.engine.chunks import ChunkPace
from lvlm.runtime.engine.faults import described
from lvlm.runtime.engine.image_cache import ImageCache
from lvlm.runtime.engine.prefilling import Prefilling, deadlines_watched, end_overdue
from lvlm.runtime.engine.request import Request
from lvlm.runtime.engine.stats import EngineStats

log = logging.getLogger(__name__)


class Scheduler:
    """First come, first served: the oldest request takes the next free slot, all have slots alike,
    and every running one gets a token a step; so none starves.

    Prompts are read between decode steps: where the backend has a ``gate``, in slices of time that
    ``pace`` says; else a piece after the other, a chunk whose length it says, or a whole prompt
    where the recipe decides with all of it.
    ``submit``, ``wake`` and ``close`` are for any thread, all else is for the engine's own.
    """

    def __init__(
        self,
        batch: Batch,
        images: ImageCache,
        queue_limit: int,
        pace: ChunkPace,
        gate: Gate | None,
    ) -> None:
        self.batch, self.images, self.queue_limit = batch, images, queue_limit
        self.pace, self.gate = pace, gate
        self._owed = 0  # decode steps before more of a prompt is read
        self.waiting: deque[Request] = deque()
        self._prefilling: Prefilling | None = None
        self._changed = threading.Condition()
        self._closing: str | None = None  # "now", or "finish" what is there first
        self._home = Home("engine")
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
            self.check_room()
            self.waiting.append(request)
            self.batch.meter.submitted += len(request.group)
            self._changed.notify_all()

    def check_room(self) -> None:
        """Raises QueueFullError, EngineClosedError."""
        if self._closing is not None:
            raise EngineClosedError("this engine is closed; open the bundle again")
        if len(self.waiting) >= self.queue_limit:
            raise QueueFullError(
                f"{self.queue_limit} requests are waiting already; try again later, or give "
                "the engine more slots or a larger queue_limit"
            )

    def wake(self) -> None:
        """A caller has ended its request: the engine's thread may be inside a graph for it."""
        self._stop_unwanted()
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
            prefilling = self._prefilling if self._closing == "now" else None
        if prefilling is not None:
            prefilling.stop()

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
                self._admit()
                self._read()
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
                self._prefilling.stop()
                self._prefilling.end()
            for request in left:
                request.caller.fail(error)
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
                if not idle:
                    return True
                self._changed.wait()

    def _all(self) -> list[Request]:
        with self._changed:
            prefilling = self._prefilling.request.group if self._prefilling is not None else []
            return [*_members(self.waiting), *prefilling, *self.batch.running]

    def _stop_unwanted(self) -> None:
        prefilling = self._prefilling
        if prefilling is not None and prefilling.unwanted:
            prefilling.stop()

    def _sweep(self) -> None:
        """End what is over its time, and drop what its caller has ended."""
        end_overdue(self._all())
        with self._changed:
            self.waiting = deque(r for w in self.waiting if (r := _wanted(w)) is not None)
        self._stop_unwanted()
        self.batch.settle()

    def _admit(self) -> None:
        """The oldest request that waits takes a slot, or one for each of its answers, if they are
        free."""
        while self.waiting and self.batch.slots.room(len(self.waiting[0].group)):
            request = self.waiting[0]
            request.leave_queue()
            reading = self.batch.admit([request])
            with self._changed:  # only now: whatever goes wrong in between, it is told
                if reading is not None:
                    gate = self.gate if reading.gated else None
                    self._prefilling = Prefilling(reading, gate)
                self.waiting.popleft()

    def _read(self) -> None:
        """The next piece of the prompt that is being read, if those that run had their steps. With
        the last one it becomes a running request, which has its first token."""
        prefilling, streams = self._prefilling, len(self.batch.running)
        if prefilling is None:
            return
        if streams and self._owed > 0 and not prefilling.stopped:
            return
        began = time.perf_counter()
        try:
            with deadlines_watched(self._all, self._stop_unwanted):
                self._stop_unwanted()  # ended since the sweep
                queue = bool(self.waiting)
                logits = prefilling.go_on(self.pace, streams, queue=queue)
        except Exception as error:
            if self._closing != "now":  # else it is told so, with all others
                self.batch.lose(prefilling.reading.requests, error)
                self._prefilling = None
            return
        took = time.perf_counter() - began
        self._owed = self.pace.steps_after(took, queue=queue and prefilling.in_slices)
        if logits is not None:
            places = self.batch.begin(prefilling.reading, logits)
            self._prefilling = None
            self.batch.choose(places)

    def _step(self) -> None:
        """One more token of every running request."""
        if not self.batch.running:
            return
        began = time.perf_counter()
        self.batch.step()
        self._owed -= 1
        self.pace.stepped(time.perf_counter() - began)


def _members(requests: Iterable[Request]) -> list[Request]:
    return [member for request in requests for member in request.group]


def _wanted(request: Request) -> Request | None:
    """Rest of a request that waits when answers that nobody waits for are gone; None: nothing."""
    left = [member for member in request.group if not member.caller.done]
    if not left:
        return None
    left[0].forks = left[1:]
    return left[0]
