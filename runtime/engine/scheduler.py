"""The engine's thread: admits, prefills and decodes, one decode step of all running requests after
the other. A request joins or leaves between two steps."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np

from lvlm.core.errors import (
    BackendError,
    EngineClosedError,
    LvlmError,
    QueueFullError,
    RequestTimeout,
)
from lvlm.core.forks import Home, orphan_in_children
from lvlm.runtime.backends import Call
from lvlm.runtime.engine.image_cache import ImageCache
from lvlm.runtime.engine.prefixes import worthwhile
from lvlm.runtime.engine.request import Request
from lvlm.runtime.engine.slots import Slots
from lvlm.runtime.engine.stats import EngineStats, Meter
from lvlm.runtime.engine.steps import Steps, again, described, typed
from lvlm.runtime.engine.worker import Beside, Inline, Worker
from lvlm.runtime.generate.loaded_graphs import Graphs

log = logging.getLogger(__name__)


@dataclass
class Prefilling:
    """A request whose prompt is being read, into the reserved row, by ``call``."""

    request: Request
    call: Call
    logits: Future[np.ndarray]
    stopped: bool = False

    def stop(self) -> None:
        """Nobody waits for it any more."""
        if not self.stopped:
            self.call.stop()
        self.stopped = True


class Scheduler:
    """First come, first served: the oldest request takes the next free slot, all have slots alike,
    and every running one gets a token a step; so none starves.

    Where the backend can (Backend.parallel) a prompt is read on a second thread, beside decode.
    ``submit``, ``wake`` and ``close`` are for any thread, all else is for the engine's own.
    """

    def __init__(self, graphs: Graphs, slots: Slots, images: ImageCache, queue_limit: int) -> None:
        self.graphs, self.slots, self.images = graphs, slots, images
        self.queue_limit = queue_limit
        self.waiting: deque[Request] = deque()
        self._prefilling: Prefilling | None = None
        self._changed = threading.Condition()
        self._closing: str | None = None  # "now", or "finish" what is there first
        self._home = Home("engine")
        self._meter = Meter()
        self._steps = Steps(graphs, slots)
        self._worker: Worker = Beside("lvlm-prefill") if graphs.backend.parallel else Inline()
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
            self._meter.submitted += 1
            self._changed.notify_all()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def stats(self) -> EngineStats:
        with self._changed:
            waiting, running = len(self.waiting), len(self.slots.running)
            reading = self._prefilling is not None
        cache, meter = self.slots.cache, self._meter
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
        """As ``close``, but without waiting for the end."""
        with self._changed:
            if self._closing != "now":
                self._closing = "finish" if finish else "now"
            self._changed.notify_all()

    def orphan(self) -> None:
        """In a forked child, where the engine's thread is not: whoever held the lock is gone."""
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
                self._take_prefilled()  # one that was read on this thread
                if self.slots.running:
                    self._step()
        except Exception as bug:  # nobody may wait for ever
            error = BackendError(f"the engine stopped ({described(bug)}); open it again")
            log.exception("the engine stopped")
        finally:
            with self._changed:
                self._closing = "now"
                left = [*self.waiting, *self.slots.running]
                self.waiting.clear()
            if self._prefilling is not None:
                left.append(self._prefilling.request)
            for request in left:
                request.handle.fail(again(error))
            if self._prefilling is not None:
                self._prefilling.stop()
            self._worker.close()
            self._free()
            atexit.unregister(self.close)

    def _free(self) -> None:
        """Give back the memory, even if someone keeps the closed engine."""
        self._prefilling = None
        self._steps.calls.clear()
        self.slots.cache.buffers.clear()
        self.graphs.sessions.clear()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when the engine is to end."""
        with self._changed:
            while True:
                idle = not (self.waiting or self.slots.running or self._prefilling)
                if self._closing == "now" or (self._closing == "finish" and idle):
                    return False
                ready = self._prefilling is not None and self._prefilling.logits.done()
                if self.slots.running or ready or (self.waiting and not self._prefilling):
                    return True
                if any(request.handle.done for request in self._all()):
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
        return prefilling.request.handle.done and not prefilling.stopped

    def _all(self) -> list[Request]:
        prefilling = [self._prefilling.request] if self._prefilling is not None else []
        live = [r for r in prefilling if not r.handle.done]
        return [*self.waiting, *live, *self.slots.running]

    def _sweep(self) -> None:
        """End what is over its time, and drop what its caller has ended."""
        now = time.perf_counter()
        with self._changed:
            everyone = self._all()
        for request in everyone:
            if request.deadline is not None and now >= request.deadline:
                request.handle.fail(
                    RequestTimeout("the request's timeout is over; give it more, or ask less")
                )
        with self._changed:
            self.waiting = deque(r for r in self.waiting if not r.handle.done)
        if self._prefilling is not None and self._unwanted(self._prefilling):
            self._prefilling.stop()
        for place in reversed(range(len(self.slots.running))):
            request = self.slots.running[place]
            if request.handle.done:
                # While decode reads a prompt nobody looks whether the logits are finite.
                self.slots.release(place, keep=not request.feed)

    def _admit(self) -> None:
        """The oldest request that waits takes a slot, if one is free."""
        while self._prefilling is None and self.waiting:
            request = self.waiting[0]
            reserved = self.slots.reserve(request.keys)
            if reserved is None:
                return
            row, prefix = reserved
            request.begin()
            self._meter.prompt_tokens += len(request.prompt.ids)
            if prefix is not None and worthwhile(request.prompt, prefix.length):
                self.slots.fill_from(prefix)
                request.reused = prefix.length
                self._meter.reused_tokens += prefix.length
                request.feed.extend(request.prompt.ids[prefix.length :])
                request.row.position = int(request.prompt.positions[..., prefix.length].max())
                self.slots.start(request)
                self._leave_queue()
                continue
            try:
                call = self.graphs.bind("prefill", self.slots.cache.views(slice(row, row + 1)))
            except Exception as error:
                request.handle.fail(typed(error))
                self.slots.abandon()
                self._leave_queue()
                continue
            future = self._worker.submit(partial(self._prefill, request, call), self.wake)
            self._prefilling = Prefilling(request, call, future)
            self._leave_queue()

    def _leave_queue(self) -> None:
        """Only when it is elsewhere: whatever goes wrong in between, it is told."""
        with self._changed:
            self.waiting.popleft()

    def _prefill(self, request: Request, call: Call) -> np.ndarray:
        """Logits [vocabulary] after the prompt; on the worker's thread."""
        began = time.perf_counter()
        features = self.images.features(
            request.digests, request.prompt.pictures, self.graphs.encode
        )
        request.vision_ms = (time.perf_counter() - began) * 1e3
        began = time.perf_counter()
        logits, request.maps = self.graphs.prefill([request.prompt], request.counts, features, call)
        request.prefill_ms = (time.perf_counter() - began) * 1e3
        first: np.ndarray = logits[0]
        return first

    def _take_prefilled(self) -> None:
        """A prompt that has been read becomes a running request, with its first token."""
        done = self._prefilling
        if done is None or not done.logits.done():
            return
        request, row = done.request, self.slots.filling
        if (problem := done.logits.exception()) is not None:
            request.handle.fail(typed(problem))
        if request.handle.done:
            self.slots.abandon()
            self._prefilling = None
            return
        assert row is not None
        counts = request.counts
        self.slots.cache.begin(
            counts.prefill.entries, counts.kept, slice(row, row + 1), counts.budgets
        )
        place = self.slots.start(request)
        self._prefilling = None
        self._choose(place, done.logits.result())

    def _step(self) -> None:
        """One decode step of every running request."""
        began = time.perf_counter()
        running = list(self.slots.running)
        failed = self._steps.run()
        took = (time.perf_counter() - began) * 1e3
        for place in reversed(range(len(running))):  # a release moves only later places
            request = running[place]
            if place in failed:
                request.handle.fail(failed[place])
                self.slots.release(place, keep=False)
                continue
            request.decode_ms += took
            request.decode_steps += 1
            request.row.position += 1
            if request.feed:
                request.feed.popleft()
            if not request.feed:
                self._choose(place, self._steps.logits[place])

    def _choose(self, place: int, logits: np.ndarray) -> None:
        """The next token of a running request, which may be its last."""
        request = self.slots.running[place]
        try:
            request.choose(logits, self.graphs.manifest.text.eos_ids)
        except Exception as error:
            request.handle.fail(typed(error))
            self.slots.release(place, keep=False)
            return
        self._meter.token()
        if request.row.finish_reason is not None:
            cache = self.slots.cache
            slot = cache.bytes_allocated // self.slots.count
            answer = request.generation(slot, cache.bytes_used(place))
            self.slots.release(place, keep=True)
            self._meter.answered += not request.handle.done
            request.handle.finish(answer)
