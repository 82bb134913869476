"""Reading of prompts into rows of the cache: at once, or in pieces behind what is there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from lvlm.runtime.backends import Call
from lvlm.runtime.engine.chunks import ChunkPace
from lvlm.runtime.engine.encoding import Encode, Encoding
from lvlm.runtime.engine.request import Request
from lvlm.runtime.generate.call_plan import PromptCounts
from lvlm.runtime.generate.loaded_graphs import TOKENS_AT_ONCE, Graphs
from lvlm.runtime.generate.pieces import next_piece
from lvlm.runtime.generate.tokens_behind import TokensBehind
from lvlm.runtime.kv.cache import CompactCache
from lvlm.runtime.sampling.sampler import check_finite


class Reading(Protocol):
    """A group of requests whose prompts are being read into ``rows``."""

    rows: slice

    @property
    def requests(self) -> Sequence[Request]:
        """The group."""

    @property
    def images_left(self) -> bool:
        """True while images are still to be encoded."""

    @property
    def gated(self) -> bool:
        """True where what reads the tokens can be held at a gate."""

    def run(self) -> np.ndarray:
        """Logits [B,vocabulary] after the prompts, all of what is left read at once."""

    def go_on(self, pace: ChunkPace, *, beside: bool) -> np.ndarray | None:
        """Read on, ``beside`` others that wait for their next tokens as little as can be: an image,
        or so many tokens as ``pace`` says. The logits after the last ones, None before."""

    def stop(self) -> None:
        """Stop what is being read, from another thread (Call.stop)."""

    def count(self, cache: CompactCache) -> None:
        """Note in the cache what was read. For the thread of its batch."""


@dataclass
class WholeReading:
    """All prompts of a group in one ragged prefill, ``call``."""

    requests: Sequence[Request]
    rows: slice
    graphs: Graphs
    encode: Encode
    call: Call

    def __post_init__(self) -> None:
        images = [image for request in self.requests for image in request.prompt.images]
        digests = [digest for request in self.requests for digest in request.digests]
        self._images = Encoding(self.encode, images, digests)

    @property
    def images_left(self) -> bool:
        return self._images.left > 0

    @property
    def gated(self) -> bool:
        return self.graphs.gated("prefill")

    def run(self) -> np.ndarray:
        self._images.go_on()
        began = time.perf_counter()
        prompts = self._images.placed([r.prompt for r in self.requests])
        features = self._images.features
        logits, maps = self.graphs.prefill(prompts, self.requests[0].counts, features, self.call)
        took = time.perf_counter() - began
        rows = self._images.rows(prompts)
        for index, request in enumerate(self.requests):
            request.vision_ms = self._images.ms
            request.prefill_ms = took * 1e3
            request.note(0, rows[index], [m[index] for m in maps])
        return logits

    def go_on(self, pace: ChunkPace, *, beside: bool) -> np.ndarray | None:  # noqa: ARG002
        if beside and self._images.left:
            self._images.go_on(1)
            return None
        return self.run()

    def stop(self) -> None:
        self.call.stop()

    def count(self, cache: CompactCache) -> None:
        _begin(cache, self.requests[0].counts, self.rows)


@dataclass
class ReadingInPieces:
    """Reading of what follows the first ``start`` tokens of one prompt, whose entries lie in its
    row, by ``call``: extend, a piece after the other."""

    request: Request
    rows: slice
    graphs: Graphs
    encode: Encode
    call: Call
    start: int
    _features: np.ndarray | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._images = _encoding(self.encode, self.request, self.start)

    @property
    def requests(self) -> Sequence[Request]:
        return (self.request,)

    @property
    def left(self) -> int:
        """Tokens that are still to be read."""
        return len(self.request.prompt.ids) - self.start

    @property
    def images_left(self) -> bool:
        return self._images.left > 0

    @property
    def gated(self) -> bool:
        return self.graphs.gated("extend")

    def run(self) -> np.ndarray:
        while True:
            logits, _ = self.read(TOKENS_AT_ONCE)
            if logits is not None:
                return logits

    def go_on(self, pace: ChunkPace, *, beside: bool) -> np.ndarray | None:
        if beside and self._images.left:
            self._encode(1)
            return None
        before = self.start
        logits, seconds = self.read(pace.tokens(beside=beside))
        pace.read(self.start - before, seconds)
        return logits

    def read(self, tokens: int) -> tuple[np.ndarray | None, float]:
        """Read about so many tokens, the images before the first ones: logits [1,vocabulary] after
        the last ones, and how many seconds the tokens took."""
        self._encode()
        began, prompt = time.perf_counter(), self.request.prompt
        span = next_piece(prompt.image_id, self.start, tokens, self.graphs.manifest.images)
        logits = self.graphs.extend(prompt, span, self._all_features(), self.call)
        self.start = span.stop
        seconds = time.perf_counter() - began
        check_finite(logits)  # those of the last piece alone are looked at later
        self.request.prefill_ms += seconds * 1e3
        return None if self.left else logits, seconds

    def _encode(self, count: int | None = None) -> None:
        if self._images.left:
            self._images.go_on(count)
            self.request.vision_ms = self._images.ms
            if not self._images.left:
                _note(self.request, self._images)
                (self.request.prompt,) = self._images.placed([self.request.prompt])

    def _all_features(self) -> np.ndarray:
        """[V,D] of the images that are shown from the first piece on; put together once."""
        if self._features is None:
            joined = self._images.joined()
            nothing = (0, self.graphs.manifest.feature_width)
            self._features = np.zeros(nothing, np.float32) if joined is None else joined
        return self._features

    def stop(self) -> None:
        self.call.stop()

    def count(self, cache: CompactCache) -> None:
        _begin(cache, self.request.counts, self.rows)


@dataclass
class TurnReading:
    """Reading of what follows the first ``start`` tokens of a session's turn, whose compressed
    entries lie in its row, ``behind`` them."""

    request: Request
    rows: slice
    behind: TokensBehind
    encode: Encode
    start: int

    def __post_init__(self) -> None:
        self._images = _encoding(self.encode, self.request, self.start)

    @property
    def requests(self) -> Sequence[Request]:
        return (self.request,)

    @property
    def images_left(self) -> bool:
        return self._images.left > 0

    @property
    def gated(self) -> bool:
        return self.behind.graphs.gated("extend")

    def run(self) -> np.ndarray:
        self._images.go_on()
        began = time.perf_counter()
        joined, width = self._images.joined(), self.behind.graphs.manifest.feature_width
        rows = np.zeros((0, width), np.float32) if joined is None else joined
        (prompt,) = self._images.placed([self.request.prompt])
        _note(self.request, self._images)
        logits = self.behind.read(prompt, self.start, rows)
        self.request.vision_ms = self._images.ms
        self.request.prefill_ms = (time.perf_counter() - began) * 1e3
        return logits

    def go_on(self, pace: ChunkPace, *, beside: bool) -> np.ndarray | None:  # noqa: ARG002
        if beside and self._images.left:
            self._images.go_on(1)
            return None
        return self.run()

    def stop(self) -> None:
        self.behind.stop()

    def count(self, cache: CompactCache) -> None:
        request, counts = self.request, self.behind.counts
        cache.put(self.rows.start, counts)
        prefill = replace(request.counts.prefill, entries=counts.seen)
        request.counts = replace(request.counts, prefill=prefill, kept=counts.entries)


def _encoding(encode: Encode, request: Request, start: int) -> Encoding:
    """Encoding of a prompt's images, but for those with all tokens among the first ``start``."""
    numbers = request.prompt.image_id[start:]
    shown = numbers[numbers > 0]
    first = int(shown.min()) - 1 if len(shown) else len(request.prompt.images)
    return Encoding(encode, request.prompt.images[first:], request.digests[first:], first + 1)


def _note(request: Request, images: Encoding) -> None:
    """Note which tokens of the images went on, behind those of the beginning that was there."""
    request.note(images.first - 1, images.rows([request.prompt])[0])


def _begin(cache: CompactCache, counts: PromptCounts, rows: slice) -> None:
    cache.begin(counts.prefill.entries, counts.kept, rows, counts.budgets)
