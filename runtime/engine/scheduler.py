"""The engine's thread: admits, prefills and decodes, one decode step of all running requests after
the other. A request joins or leaves between two steps."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lvlm.runtime.backends import Call
from lvlm.runtime.engine.image_cache import ImageCache
from lvlm.runtime.engine.prefixes import worthwhile
from lvlm.runtime.engine.request import Request
from lvlm.runtime.engine.slots import Slots
from lvlm.runtime.errors import (
    BackendError,
    EngineClosedError,
    LvlmError,
    QueueFullError,
    RequestTimeout,
)
from lvlm.runtime.graphs import Graphs, check_kept


@dataclass(frozen=True)
class Prefilling:
    """A request whose prompt is being read, into the reserved row, by ``call``."""

    request: Request
    call: Call
    logits: Future[np.ndarray]


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
        self._logits = np.empty((slots.count, graphs.manifest.text.vocab), np.float32)
        self._calls: dict[tuple[str, int, int], Call] = {}
        self._pool = ThreadPoolExecutor(1, "lvlm-prefill") if graphs.backend.parallel else None
        self._thread = threading.Thread(target=self._run, name="lvlm-engine", daemon=True)
        self._thread.start()

    # For any thread

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
            self._changed.notify_all()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def close(self, *, finish: bool) -> None:
        """No more requests. Those there are finished first, or fail with EngineClosedError."""
        with self._changed:
            if self._closing != "now":
                self._closing = "finish" if finish else "now"
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # The engine's thread

    def _run(self) -> None:
        error: LvlmError = EngineClosedError("the engine was closed before the answer")
        try:
            while self._wait():
                self._sweep()
                self._take_prefilled()
                self._admit()
                if self.slots.running:
                    self._step()
        except Exception as bug:  # nobody may wait for ever
            error = BackendError(f"the engine stopped ({_described(bug)}); open it again")
            raise
        finally:
            with self._changed:
                self._closing = "now"
                left = [*self.waiting, *self.slots.running]
                self.waiting.clear()
            if self._prefilling is not None:
                left.append(self._prefilling.request)
                self._prefilling.call.stop()
            for request in left:
                request.handle.fail(type(error)(str(error)))
            if self._pool is not None:
                self._pool.shutdown(wait=True)

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
                deadlines = [r.deadline for r in self._all() if r.deadline is not None]
                until = min(deadlines, default=None)
                pause = None if until is None else until - time.perf_counter()
                if pause is not None and pause <= 0:
                    return True
                self._changed.wait(pause)

    def _all(self) -> list[Request]:
        prefilling = [self._prefilling.request] if self._prefilling is not None else []
        live = [r for r in prefilling if not r.handle.done]
        return [*self.waiting, *live, *self.slots.running]

    def _sweep(self) -> None:
        """End what is over its time, and drop what its caller has ended."""
        now = time.perf_counter()
        with self._changed:
            for request in self._all():
                if request.deadline is not None and now >= request.deadline:
                    request.handle.fail(
                        RequestTimeout("the request's timeout is over; give it more, or ask less")
                    )
            ended = [r for r in self.waiting if r.handle.done]
            for request in ended:
                self.waiting.remove(request)
        if self._prefilling is not None and self._prefilling.request.handle.done:
            self._prefilling.call.stop()
        for place in reversed(range(len(self.slots.running))):
            if self.slots.running[place].handle.done:
                self.slots.release(place, keep=True)

    def _admit(self) -> None:
        """The oldest request that waits takes a slot, if one is free."""
        while self._prefilling is None and self.waiting:
            reserved = self.slots.reserve(self.waiting[0].keys)
            if reserved is None:
                return
            row, prefix = reserved
            with self._changed:
                request = self.waiting.popleft()
            request.begin()
            if prefix is not None and worthwhile(request.prompt, prefix.length):
                self.slots.fill_from(prefix)
                request.reused = prefix.length
                request.feed.extend(request.prompt.ids[prefix.length :])
                request.row.position = int(request.prompt.positions[..., prefix.length].max())
                self.slots.start(request)
                continue
            call = self.graphs.bind("prefill", self.slots.cache.views(slice(row, row + 1)))
            if self._pool is None:
                future = _done(self._prefill, request, call)
            else:
                future = self._pool.submit(self._prefill, request, call)
                future.add_done_callback(lambda _: self.wake())
            self._prefilling = Prefilling(request, call, future)
            self._take_prefilled()

    def _prefill(self, request: Request, call: Call) -> np.ndarray:
        """Logits [vocabulary] after the prompt; on the second thread, if there is one."""
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
        self._prefilling = None
        request, row = done.request, self.slots.filling
        if (problem := done.logits.exception()) is not None:
            request.handle.fail(_typed(problem))
        if request.handle.done:
            self.slots.abandon()
            return
        assert row is not None
        counts = request.counts
        self.slots.cache.begin(
            counts.prefill.entries, counts.kept, slice(row, row + 1), counts.budgets
        )
        place = self.slots.start(request)
        self._choose(place, done.logits.result())

    def _step(self) -> None:
        """One decode step of every running request."""
        began = time.perf_counter()
        cache, running = self.slots.cache, list(self.slots.running)
        failed = self._decode()
        advanced = np.zeros(self.slots.count, bool)
        advanced[: len(running)] = [place not in failed for place in range(len(running))]
        cache.advance(advanced)
        failed |= self._compact()
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
                self._choose(place, self._logits[place])

    def _choose(self, place: int, logits: np.ndarray) -> None:
        """The next token of a running request, which may be its last."""
        request = self.slots.running[place]
        try:
            request.choose(logits, self.graphs.manifest.text.eos_ids)
        except LvlmError as error:
            request.handle.fail(error)
            self.slots.release(place, keep=False)
            return
        if request.row.finish_reason is not None:
            cache = self.slots.cache
            slot = cache.bytes_allocated // self.slots.count
            answer = request.generation(slot, cache.bytes_used(place))
            self.slots.release(place, keep=True)
            request.handle.finish(answer)

    def _decode(self) -> dict[int, LvlmError]:
        """Run decode for the running rows; which of them failed, and why.

        If it fails for all at once it is tried row by row, so that one request's fault is not the
        others': a step writes the same slots again, and nothing is counted before it is done.
        """
        count = len(self.slots.running)
        tokens = np.array([r.next_token for r in self.slots.running], np.int64)
        positions = np.array([r.row.position for r in self.slots.running], np.int64)

        def decode(rows: slice) -> None:
            inputs = self.slots.cache.decode_inputs(tokens[rows], positions[rows], rows)
            self._call("decode", rows.start, rows.stop)(inputs, {"logits": self._logits[rows]})

        try:
            decode(slice(0, count))
            return {}
        except Exception as error:
            if count == 1:
                return {0: _typed(error)}
        failed = {}
        for place in range(count):
            try:
                decode(slice(place, place + 1))
            except Exception as error:
                failed[place] = _typed(error)
        return failed

    def _compact(self) -> dict[int, LvlmError]:
        """Drop entries of the rows whose interval is over; which failed."""
        cache = self.slots.cache
        inputs = cache.compaction()
        if inputs is None:
            return {}
        count = len(self.slots.running)
        kept = np.empty_like(inputs["kv_budget"])
        due = (inputs["kv_budget"] != inputs["valid_length"]).any(0)
        try:
            self._call("compact", 0, count)(inputs, {"kept": kept})
        except Exception as error:
            return {int(p): BackendError(str(_typed(error))) for p in np.flatnonzero(due)}
        failed: dict[int, LvlmError] = {}
        for place in range(count):
            some = slice(place, place + 1)
            try:
                check_kept(kept[:, some], inputs["kv_budget"][:, some])
            except BackendError as error:
                failed[place] = error
        cache.compacted()
        return failed

    def _call(self, name: str, start: int, stop: int) -> Call:
        """A graph over some rows, bound once."""
        key = (name, start, stop)
        if key not in self._calls:
            self._calls[key] = self.graphs.bind(name, self.slots.cache.views(slice(start, stop)))
        return self._calls[key]


def _done(
    compute: Callable[[Request, Call], np.ndarray], request: Request, call: Call
) -> Future[np.ndarray]:
    """Computed here and now; an error is the future's."""
    future: Future[np.ndarray] = Future()
    try:
        future.set_result(compute(request, call))
    except Exception as error:
        future.set_exception(error)
    return future


def _typed(error: BaseException) -> LvlmError:
    """The error for one request's caller, of its own."""
    if isinstance(error, LvlmError):
        return error
    return BackendError(f"the backend failed ({_described(error)}); the request is lost")


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
