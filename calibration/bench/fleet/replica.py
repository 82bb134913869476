"""One engine of a simulated fleet: its queue, its slots, and the order in which it works.

The order is that of runtime/engine/scheduler.py, the lengths of chunks and slices are its
ChunkPace's.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from lvlm.bench.costs import EngineShape
from lvlm.bench.fleet.arrivals import Arrival
from lvlm.bench.fleet.service_times import ServiceTimes
from lvlm.runtime.engine.chunks import ChunkPace
from lvlm.runtime.generate.loaded_graphs import TOKENS_AT_ONCE

SHARED = 8  # of a prompt's tokens one, at least, for its beginning to be used again


@dataclass(eq=False)
class Job:
    """A request on its way. ``tokens``: when each of its answer was there."""

    number: int
    asked: Arrival
    replica: int = -1
    refused: bool = False
    known: bool = False  # its images' features
    reused: int = 0  # tokens of its prompt
    tokens: list[float] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.asked.new_tokens


@dataclass
class Piece:
    """A unit of an engine's work: an image or more and ``tokens`` of a prompt, a slice of the time
    that its rest takes (seconds), or a step."""

    kind: Literal["read", "step"]
    seconds: Callable[[ServiceTimes], float]
    images: int = 0
    tokens: int = 0
    slice_of: Callable[[ServiceTimes], float] | None = None
    queue: bool = False  # others waited when the slice began


class SimulatedReplica:
    """``begin`` says what it does next, ``finish`` that this is done. ``preparing``: requests that
    are on their way into its queue."""

    def __init__(self, engine: EngineShape, queue_limit: int) -> None:
        self.engine, self.queue_limit = engine, queue_limit
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.preparing = 0
        self._reading: Job | None = None
        self._images_left = self._read = 0
        self._worked = 0.0  # part of the rest that slices have read
        self._pace, self._owed = ChunkPace(None), 0
        self._stepping = False  # the prompt has had its turn of this round
        self._features: OrderedDict[str, int] = OrderedDict()
        self._kept: list[str] = []  # images that rows hold which nobody runs in, used last last

    @property
    def requests(self) -> int:
        """Number of requests here, of any kind."""
        there = len(self.waiting) + len(self.running) + (self._reading is not None)
        return self.preparing + there

    @property
    def full(self) -> bool:
        """True where it refuses what comes."""
        return len(self.waiting) + self.preparing >= self.queue_limit

    def begin(self) -> Piece | None:
        """The next piece of work; None: there is nothing to do."""
        if self._stepping:
            self._stepping = False
            if self.running:
                return self._step()
        self._admit()
        if self._reading is not None and not (self.running and self._owed > 0):
            self._stepping = True
            return self._piece(self._reading)
        return self._step() if self.running else None

    def finish(self, piece: Piece, now: float, took: float, own: ServiceTimes) -> None:
        """A piece ended ``now`` and ``took`` so long."""
        if piece.kind == "step":
            self._owed -= 1
            self._pace.stepped(took)
            for running in self.running:
                running.tokens.append(now)
            self._settle()
            return
        job = self._reading
        assert job is not None
        self._images_left -= piece.images
        if piece.images:
            self._remember(job)
        self._read += piece.tokens
        if piece.tokens and self.engine.chunked:
            share = own.chunk(piece.tokens, self._read - piece.tokens) / piece.seconds(own)
            self._pace.read(piece.tokens, took * share)
        if piece.slice_of is not None:
            self._worked += piece.seconds(own) / piece.slice_of(own)
            if self._worked > 1 - 1e-9:
                self._read = self._length(job)
        self._owed = self._pace.steps_after(took, queue=piece.queue)
        if self._read == self._length(job):
            self._reading = None
            job.tokens.append(now)
            self.running.append(job)
            self._settle()

    def _length(self, job: Job) -> int:
        return job.asked.text_tokens + job.asked.images * self.engine.image_tokens

    def _admit(self) -> None:
        if self._reading is not None or len(self.running) >= self.engine.slots:
            return
        if not self.waiting:
            return
        job = self._reading = self.waiting.popleft()
        name, shown = job.asked.image, job.asked.images
        shared = shown * self.engine.image_tokens
        if self.engine.shares and name is not None and SHARED * shared >= self._length(job):
            if any(other.asked.image == name for other in self.running):
                job.reused = shared
            elif name in self._kept:
                job.reused = shared
                self._kept.remove(name)
                self._kept.append(name)
        job.known = name is not None and name in self._features
        if job.known and name is not None:
            self._features.move_to_end(name)
        self._images_left = 0 if job.known or job.reused else shown
        self._read, self._worked = job.reused, 0.0
        self._trim()

    def _piece(self, job: Job) -> Piece:
        left, beside = self._length(job) - self._read, bool(self.running)
        if beside and self._images_left:
            return Piece("read", lambda times: times.image(1), images=1)
        images, behind = self._images_left, self._read
        if self._worked or (self.engine.sliced and beside and self._pace.measured):
            return self._slice(partial(self._rest, job), self._worked)
        if not self.engine.chunked:
            shown = job.asked.images
            return Piece(
                "read", lambda t: t.image(images) + t.whole(left, shown), images, tokens=left
            )
        tokens = min(self._pace.tokens(beside=beside), left)
        return Piece("read", lambda t: t.image(images) + t.chunk(tokens, behind), images, tokens)

    def _slice(self, rest: Callable[[ServiceTimes], float], worked: float) -> Piece:
        queue = bool(self.waiting)
        at_most = math.inf  # of what nobody runs beside
        if self.running:
            at_most = self._pace.slice_seconds(len(self.running), queue=queue)
        return Piece(
            "read", lambda t: min(at_most, (1 - worked) * rest(t)), slice_of=rest, queue=queue
        )

    def _rest(self, job: Job, times: ServiceTimes) -> float:
        """Seconds of what slices read of a prompt."""
        length = self._length(job)
        if not self.engine.chunked:
            return times.whole(length - self._read, job.asked.images)
        starts = range(self._read, length, TOKENS_AT_ONCE)
        return sum(times.chunk(min(TOKENS_AT_ONCE, length - s), s) for s in starts)

    def _step(self) -> Piece:
        rows = len(self.running)
        tokens = sum(self._length(job) + len(job.tokens) for job in self.running) / rows
        return Piece("step", lambda times: times.step(rows, tokens))

    def _settle(self) -> None:
        """Answers that are there leave their rows (runtime/engine/slots.py): the last row is kept,
        one before it only where another can hold it; the last running one takes its place."""
        for place in reversed(range(len(self.running))):
            job, last = self.running[place], self.running[-1]
            if not job.done:
                continue
            name = job.asked.image or f"number {job.number}"
            if job is last:
                self._kept.append(name)
            elif self._free() > len(self._kept) or self._kept:
                self._kept.append(name)
                self._trim()
            self.running[place] = last
            self.running.pop()

    def _free(self) -> int:
        """Rows that nobody runs in."""
        return self.engine.slots - len(self.running) - (self._reading is not None)

    def _trim(self) -> None:
        """Drop what was used longest ago."""
        del self._kept[: max(0, len(self._kept) - self._free())]

    def _remember(self, job: Job) -> None:
        """Features of its images."""
        if job.asked.image is not None and not self._images_left:
            self._features[job.asked.image] = job.asked.images
            while sum(self._features.values()) > self.engine.kept_images:
                self._features.popitem(last=False)
