"""Reading of prompts into rows of the cache: at once, or in pieces behind what is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from lvlm.runtime.backends import Call
from lvlm.runtime.engine.request import Request
from lvlm.runtime.generate.call_plan import PromptCounts
from lvlm.runtime.generate.loaded_graphs import TOKENS_AT_ONCE, Graphs
from lvlm.runtime.generate.tokens_behind import TokensBehind
from lvlm.runtime.kv.cache import CompactCache
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.prompt.prompts import Prompt
from lvlm.runtime.sampling.sampler import check_finite

# Features [V,D] of each image; they are named by their digests, where anybody has asked for these.
Encode = Callable[[Sequence[PreparedImage], Sequence[bytes]], list[np.ndarray]]


class Reading(Protocol):
    """A group of requests whose prompts are being read into ``rows``."""

    rows: slice

    @property
    def requests(self) -> Sequence[Request]:
        """The group."""

    def run(self) -> np.ndarray:
        """Logits [B,vocabulary] after the prompts. Beside decode, where the backend is parallel."""

    def stop(self) -> None:
        """Stop a run that is on, from another thread (Call.stop)."""

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

    def run(self) -> np.ndarray:
        began = time.perf_counter()
        images = [image for request in self.requests for image in request.prompt.images]
        digests = [digest for request in self.requests for digest in request.digests]
        features = self.encode(images, digests)
        encoded = time.perf_counter()
        prompts = [request.prompt for request in self.requests]
        logits, maps = self.graphs.prefill(prompts, self.requests[0].counts, features, self.call)
        ended = time.perf_counter()
        for index, request in enumerate(self.requests):
            request.vision_ms = (encoded - began) * 1e3
            request.prefill_ms = (ended - encoded) * 1e3
            request.maps = [m[index] for m in maps]
        return logits

    def stop(self) -> None:
        self.call.stop()

    def count(self, cache: CompactCache) -> None:
        _begin(cache, self.requests[0].counts, self.rows)


@dataclass
class ReadingInPieces:
    """What follows the first ``start`` tokens of one prompt, whose entries lie in its row, by
    ``call``: extend, a piece after the other."""

    request: Request
    rows: slice
    graphs: Graphs
    encode: Encode
    call: Call
    start: int
    _features: list[np.ndarray] = field(default_factory=list, init=False)
    _next_image: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._next_image = images_read(self.request.prompt, self.start)

    @property
    def requests(self) -> Sequence[Request]:
        return (self.request,)

    @property
    def left(self) -> int:
        """Tokens that are still to be read."""
        return len(self.request.prompt.ids) - self.start

    @property
    def images_left(self) -> int:
        """Images that are still to be encoded before tokens can be read."""
        return len(self.request.prompt.images) - self._next_image

    def run(self) -> np.ndarray:
        while True:
            logits, _ = self.read(TOKENS_AT_ONCE)
            if logits is not None:
                return logits

    def encode_images(self, count: int) -> None:
        """Encode so many of the images that are left."""
        began, prompt = time.perf_counter(), self.request.prompt
        some = slice(self._next_image, self._next_image + count)
        self._features += self.encode(prompt.images[some], self.request.digests[some])
        self._next_image = min(some.stop, len(prompt.images))
        self.request.vision_ms += (time.perf_counter() - began) * 1e3

    def read(self, tokens: int) -> tuple[np.ndarray | None, float]:
        """Read so many tokens, the images before the first ones: logits [1,vocabulary] after the
        last ones, and how many seconds the tokens took."""
        if self.images_left:
            self.encode_images(self.images_left)
        began = time.perf_counter()
        span = range(self.start, self.start + min(tokens, self.left))
        logits = self.graphs.extend(self.request.prompt, span, self._all_features(), self.call)
        self.start = span.stop
        seconds = time.perf_counter() - began
        check_finite(logits)  # those of the last piece alone are looked at later
        self.request.prefill_ms += seconds * 1e3
        return None if self.left else logits, seconds

    def _all_features(self) -> np.ndarray:
        """[V,D] of the images that have been encoded; put together once."""
        if not self._features:
            return np.zeros((0, self.graphs.manifest.feature_width), np.float32)
        if len(self._features) > 1:
            self._features = [np.concatenate(self._features)]
        return self._features[0]

    def stop(self) -> None:
        self.call.stop()

    def count(self, cache: CompactCache) -> None:
        _begin(cache, self.request.counts, self.rows)


@dataclass
class TurnReading:
    """What follows the first ``start`` tokens of a session's turn, whose compressed entries lie in
    its row, ``behind`` them."""

    request: Request
    rows: slice
    behind: TokensBehind
    encode: Encode
    start: int

    @property
    def requests(self) -> Sequence[Request]:
        return (self.request,)

    def run(self) -> np.ndarray:
        request, prompt = self.request, self.request.prompt
        began = time.perf_counter()
        some = slice(images_read(prompt, self.start), None)
        features = self.encode(prompt.images[some], request.digests[some])
        width = self.behind.graphs.manifest.feature_width
        rows = np.concatenate(features) if features else np.zeros((0, width), np.float32)
        encoded = time.perf_counter()
        logits = self.behind.read(prompt, self.start, rows)
        request.vision_ms = (encoded - began) * 1e3
        request.prefill_ms = (time.perf_counter() - encoded) * 1e3
        return logits

    def stop(self) -> None:
        self.behind.stop()

    def count(self, cache: CompactCache) -> None:
        request, counts = self.request, self.behind.counts
        cache.put(self.rows.start, counts)
        prefill = replace(request.counts.prefill, entries=counts.seen)
        request.counts = replace(request.counts, prefill=prefill, kept=counts.entries)


def images_read(prompt: Prompt, tokens: int) -> int:
    """How many images need no encoding: all of their tokens are among the first ``tokens``."""
    numbers = prompt.image_id[tokens:]
    shown = numbers[numbers > 0]
    return int(shown.min()) - 1 if len(shown) else len(prompt.images)


def _begin(cache: CompactCache, counts: PromptCounts, rows: slice) -> None:
    cache.begin(counts.prefill.entries, counts.kept, rows, counts.budgets)
