"""The host's one loop: requests over the rows of one cache, read in groups, then decoded together,
a token a step.

    Model    a call's prompts are one group, read in one ragged prefill, in the caller's thread;
             so are those whose logits an export is checked by (calls.py)
    Engine   a request is a group, read between the others' decode steps, in a thread of its own
             (scheduler.py)

Whoever drives it admits a group (``admit``), has its prompts read (``Reading.run`` or ``go_on``),
lets it ``begin``, or ``lose``s it, and calls ``step`` while anything runs. Tokens, answers and
errors go to each request's caller. There is no thread, lock or queue here: those are the
scheduler's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np

from lvlm.runtime.engine.encoding import Encode
from lvlm.runtime.engine.prefixes import worthwhile
from lvlm.runtime.engine.reading import (
    Reading,
    ReadingInPieces,
    TurnReading,
    WholeReading,
)
from lvlm.runtime.engine.request import Request
from lvlm.runtime.engine.session import Read
from lvlm.runtime.engine.slots import Prefix, Slots
from lvlm.runtime.engine.stats import Meter
from lvlm.runtime.engine.steps import Steps
from lvlm.runtime.generate.loaded_graphs import Graphs
from lvlm.runtime.generate.tokens_behind import TokensBehind
from lvlm.runtime.kv.cache import CompactCache


class Batch:
    """Requests that run over one cache. For one thread, but for ``Reading.stop``.

    ``together``: they are one call's, which has all of its answers or an error. They end together:
    a row that has its answer is decoded on beside the others, so that a backend sees one number of
    rows throughout (an engine may be built for exactly that many, a CUDA graph is captured once),
    and nothing is tried again for some of them. Otherwise rows come and go between two steps, and
    what goes wrong with one request is no other's.

    ``in_pieces``: every prompt is read by the graph extend, not only what follows a shared
    beginning; a group is one request then.
    """

    def __init__(
        self,
        graphs: Graphs,
        slots: Slots,
        encode: Encode,
        *,
        together: bool = False,
        in_pieces: bool = False,
    ) -> None:
        self.graphs, self.slots, self.encode = graphs, slots, encode
        self.together, self.in_pieces = together, in_pieces
        self.meter = Meter()
        self._steps = Steps(graphs, slots, together=together)

    @property
    def running(self) -> list[Request]:
        """Running requests in the order of their rows."""
        return self.slots.running

    @property
    def cache(self) -> CompactCache:
        return self.slots.cache

    @property
    def logits(self) -> np.ndarray:
        """[B,vocabulary] float32 of the running requests, after ``begin``, ``feed`` and
        ``decode_step``: what their next tokens are chosen from; overwritten by the next step."""
        return self._steps.logits[: len(self.running)]

    @property
    def best(self) -> np.ndarray:
        """[B] int64: what the last step gave as BEST, where ``graphs.chooses``."""
        return self._steps.best[: len(self.running)]

    @property
    def gated(self) -> bool:
        """True where the graph that reads prompts can be held at a gate."""
        return self.graphs.gated("extend" if self.in_pieces else "prefill")

    def free(self) -> None:
        """Give back the memory, even if someone keeps the batch."""
        self._steps.calls.clear()
        self.cache.buffers.clear()
        self.graphs.sessions.clear()

    # A group comes

    def admit(self, requests: Sequence[Request]) -> Reading | None:
        """Rows for a group with its forks, for which there must be room (``Slots.room``). What is
        to be run before it can ``begin``; None if that is nothing: it goes on from another's
        entries, or failed."""
        first = requests[0]
        keys = first.keys if len(requests) == 1 else None
        count = sum(len(request.group) for request in requests)
        reserved, prefix = self.slots.reserve(count, keys, first.session)
        rows = slice(reserved.start, reserved.start + len(requests))
        self.meter.prompt_tokens += sum(len(request.prompt.ids) for request in requests)
        extends = self.graphs.extends
        if prefix is not None and self._goes_on(first, prefix):
            self.slots.fill_from(prefix)
            first.reused, first.read = prefix.length, self._read(prefix)
            self.meter.reused_tokens += prefix.length
            if not extends:
                self._feed(first, prefix.length)
                return None
        pieces = self.in_pieces or first.reused > 0
        try:
            if first.reused and not self.graphs.manifest.in_place:
                counts = self.cache.row(rows.start)
                behind = TokensBehind(self.graphs, self.cache.views(rows), counts)
                return TurnReading(first, rows, behind, self.encode, first.reused)
            call = self.graphs.bind("extend" if pieces else "prefill", self.cache.views(rows))
        except Exception as error:
            self.lose(requests, error)
            return None
        if pieces:
            return ReadingInPieces(first, rows, self.graphs, self.encode, call, first.reused)
        return WholeReading(requests, rows, self.graphs, self.encode, call)

    def _goes_on(self, request: Request, prefix: Prefix) -> bool:
        """True where a prompt is read from the end of a prefix on: where that pays, or where that
        is what its session is for."""
        if self.graphs.manifest.in_place:
            return worthwhile(request.prompt, prefix.length, extends=self.graphs.extends)
        assert prefix.read is not None
        shows = (request.prompt.image_id[prefix.length :] > 0).any()
        if self.graphs.manifest.images.bidirectional and shows:
            return False  # read as decode reads, an image's tokens would not see those that follow
        if not prefix.whole:  # images that follow would be merged, too, read as a whole
            last = (request.prompt.image_id[prefix.read.images :] > 0).any()
            ratios = (prefix.read.keep, prefix.read.kv_keep)
            pays = worthwhile(request.prompt, prefix.length, extends=True)
            return pays and not last and ratios == request.asked_ratios
        new = len(request.prompt.ids) - prefix.length + request.row.limit - 1
        fed = int(self.cache.steps[prefix.row]) + new
        return request.goes_on(prefix.read, fed, self.cache.capacities)

    def _read(self, prefix: Prefix) -> Read | None:
        """History of a prompt's first entries, of which a prefix is copied."""
        if prefix.read is None or prefix.whole or self.graphs.manifest.in_place:
            return prefix.read
        return prefix.read.of(prefix.length)

    def _feed(self, request: Request, start: int) -> None:
        """Let decode read what follows the first ``start`` tokens of a prompt, for each answer."""
        self._fork([request])
        for one in request.group:
            one.feed.extend(request.prompt.ids[start:])
            one.row.position = int(request.prompt.positions[..., start].max())
        self.slots.start(request.group)

    def _fork(self, requests: Sequence[Request]) -> tuple[list[Request], list[int]]:
        """Copies of the rows of prompts that have been read, for their forks."""
        everyone, sources = _with_forks(requests)
        self.slots.fork(sources)
        for request, source in zip(everyone, sources, strict=True):
            request.read_as(everyone[source])
        return everyone, sources

    def begin(self, reading: Reading, logits: np.ndarray) -> range:
        """A group whose prompts have been read runs; its places. ``logits`` [B,vocabulary] are
        those after the prompts."""
        if all(r.caller.done for request in reading.requests for r in request.group):
            self.slots.abandon()
            return range(0)
        reading.count(self.cache)
        everyone, sources = self._fork(reading.requests)
        places = self.slots.start(everyone)
        self._steps.logits[places.start : places.stop] = logits[sources]
        self._steps.greedy = False
        return places

    def lose(self, requests: Sequence[Request], error: Exception) -> None:
        """A group whose prompts could not be read ends; its rows are free again."""
        self.slots.abandon()
        for request in _with_forks(requests)[0]:
            request.caller.fail(error)

    # A step

    def step(self) -> None:
        """One more token of every running request."""
        going = (request.row for request in self.running if request.row.finish_reason is None)
        self.decode_step(greedy=all(row.greedy for row in going))
        self.choose(range(len(self.running)))

    def feed(self, tokens: Sequence[int]) -> None:
        """One step with these tokens, one for each running request, whatever was chosen."""
        for request, token in zip(self.running, tokens, strict=True):
            request.row.tokens.append(int(token))
        self.decode_step()

    def decode_step(self, *, greedy: bool = False) -> None:
        """Feed every row its newest token, or the next one of its prompt; afterwards ``logits`` are
        the next ones. A row whose step fails is released by ``settle``. ``greedy``: nothing but
        ``choose`` follows, and no row needs more than its likeliest token."""
        began = time.perf_counter()
        failed = self._steps.run(greedy=greedy)
        took = (time.perf_counter() - began) * 1e3
        for place, request in enumerate(self.running):
            if place in failed:
                request.spoiled = True
                request.caller.fail(failed[place])
                continue
            request.decode_ms += took
            request.decode_steps += 1
            request.row.position += request.row.finish_reason is None
            if request.feed:
                request.feed.popleft()

    def choose(self, places: Iterable[int]) -> None:
        """The next token of those that have read their prompts; answers that end with it are told
        to their callers."""
        for place in places:
            request = self.running[place]
            if request.row.finish_reason is not None or request.feed or request.spoiled:
                continue
            try:  # for a caller that has gone, too: whether its entries are finite shows here
                given = self.best if self._steps.greedy else self.logits
                request.choose(given[place], self.graphs.manifest.text.eos_ids)
            except Exception as error:
                request.spoiled = True
                request.caller.fail(error)
                continue
            self.meter.token()
        self.settle()

    def settle(self) -> None:
        """Rows of requests that have ended, one way or another, are free."""
        running, cache = self.running, self.cache
        ended = [place for place, request in enumerate(running) if request.ended]
        finite = True
        if self.together:
            if len(ended) < len(running):
                return
            # Nobody looked at the logits of rows that had their answers before the last step
            finite = self._steps.finite
        allocated = cache.bytes_allocated // (1 if self.together else self.slots.count)
        for place in reversed(ended):  # a release moves only later places
            request = running[place]
            answer = None
            if not request.caller.done:
                answer = request.generation(allocated, cache.bytes_used(place))
            # While decode reads a prompt nobody looks whether the logits are finite.
            clean = finite and not (request.spoiled or request.feed)
            self.slots.release(place, keep=clean)
            if answer is not None:
                self.meter.answered += 1
                request.caller.finish(answer)


def _with_forks(requests: Sequence[Request]) -> tuple[list[Request], list[int]]:
    """A group and then all of its forks; for each, whose prompt's entries are its own."""
    forks = [(fork, index) for index, request in enumerate(requests) for fork in request.forks]
    everyone = [*requests, *(fork for fork, _ in forks)]
    return everyone, [*range(len(requests)), *(index for _, index in forks)]
