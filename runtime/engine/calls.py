"""Calls that are answered in the caller's own thread, one at a time: a batch for each, over a cache
whose buffers serve the next one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np

from lvlm.core.errors import BackendError
from lvlm.core.forks import Home
from lvlm.runtime.engine.batch import Batch
from lvlm.runtime.engine.encoding import Encode
from lvlm.runtime.engine.request import Request
from lvlm.runtime.engine.slots import Slots
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.generate.call_plan import count_prompts, read_at
from lvlm.runtime.generate.loaded_graphs import Graphs
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.cache import CompactCache
from lvlm.runtime.kv.static_capacity import static_capacity
from lvlm.runtime.media.prepared_image import ImageTokens, PreparedImage
from lvlm.runtime.options.generation_options import Keep
from lvlm.runtime.prompt.prompts import Prompt
from lvlm.runtime.prompt.text import TextStream

CAPACITY_STEP = 64  # cache lengths are rounded up to this, so that buffers are reused


class Answer:
    """The caller of one prompt of a call: ``pieces`` of text and ``times`` (perf_counter) of the
    tokens so far, ``result`` at the end. An error is the call's, and is raised where it comes up.
    """

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.times: list[float] = []
        self.result: Generation | None = None

    @property
    def done(self) -> bool:
        return self.result is not None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def push(self, token: int, piece: str, score: object) -> None:  # noqa: ARG002 - the row has it
        self.pieces.append(piece)
        self.times.append(time.perf_counter())

    def finish(self, result: Generation) -> None:
        self.result = result

    def fail(self, error: Exception) -> None:
        raise error


Asked = tuple[Answer, TextStream | None]


class Calls:
    """Starts a batch for every call. ``encode`` gives the images' features in place of the vision
    graph."""

    def __init__(self, graphs: Graphs, encode: Encode | None = None) -> None:
        self.graphs = graphs
        self._encode = encode or partial(_features, graphs)  # no cycle: closing frees the graphs
        self._cache: CompactCache | None = None
        self._home, self._busy = Home("model"), threading.Lock()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The one call there is while it lasts. Raises BackendError for a second one, and in a
        forked child."""
        self._home.check()
        if not self._busy.acquire(blocking=False):
            raise BackendError(
                "this model is answering another call; finish or close that stream, or load a "
                "second model"
            )
        try:
            yield
        finally:
            self._busy.release()

    @contextmanager
    def run(
        self,
        prompts: Sequence[Prompt],
        keep: Keep | None = None,
        kv_keep: float | None = None,
        asked: Sequence[Sequence[Asked]] = (),
    ) -> Iterator[Batch]:
        """A batch, started; within, it is answered.

        Its buffers serve the next one only if all was answered: nothing was raised, and it was not
        left before the end. What lies in buffers beyond a row's own entries would spoil it: 0 times
        NaN is not 0.
        """
        answered = False
        try:
            batch = self.start(prompts, keep, kv_keep, asked)
            yield batch
            answered = not batch.running
        finally:
            if not answered:
                self.forget()

    def start(
        self,
        prompts: Sequence[Prompt],
        keep: Keep | None = None,
        kv_keep: float | None = None,
        asked: Sequence[Sequence[Asked]] = (),
    ) -> Batch:
        """Prompts, prefilled together; the ratios are those of generate, ``asked`` says for each
        whom its answers are told, and as what text: one, to nobody, if it is left out.

        Its ``logits`` are what the first tokens are chosen from: ``choose`` does that, ``step`` all
        that follows. Who compares logits feeds tokens instead (``Batch.feed``). ``run`` is for whom
        answers matter to. Raises ParameterError, CapacityError, BackendError.
        """
        graphs = self.graphs
        prompts = [read_at(graphs.manifest, prompt, keep) for prompt in prompts]
        counts = count_prompts(graphs.manifest, prompts, keep, kv_keep)
        asked = asked or [[(Answer(), None)]] * len(prompts)
        requests = []
        for index, (prompt, (first, *others)) in enumerate(zip(prompts, asked, strict=True)):
            requests.append(Request(prompt, counts, *first, index))
            for number, other in enumerate(others, 1):
                requests[-1].fork(number, *other)
        rows = sum(len(request.group) for request in requests)
        fed = np.array(counts.limits) - 1  # the last token is never fed back
        needed = counts.budgets.capacity(counts.prefill.entries, fed)
        cache = self.cache_for(rows, needed, counts.budgets)
        batch = Batch(graphs, Slots(cache, keeps_prefixes=False), self._encode, together=True)
        reading = batch.admit(requests)
        assert reading is not None
        try:
            logits = reading.run()
        except Exception as error:
            batch.lose(requests, error)
            raise
        batch.begin(reading, logits)
        return batch

    def cache_for(self, batch: int, needed: np.ndarray, budgets: Budgets) -> CompactCache:
        """Buffers for ``needed`` [L] entries; the last ones again where they fit."""
        manifest, backend = self.graphs.manifest, self.graphs.backend
        limits = np.array(manifest.capacity.per_layer)
        rounded = -(-needed // CAPACITY_STEP) * CAPACITY_STEP
        capacities = np.minimum(rounded, np.maximum(limits, needed))
        if backend.static_capacity:
            # never less than needed: see new_token_limit
            capacities = np.array(static_capacity(manifest).per_layer)
        old = self._cache
        if old is not None:
            same = old.lengths.shape[1] == batch and np.array_equal(old.capacities, capacities)
            if same:
                return old
        self.forget()
        old = None  # freed before the new one is allocated
        self._cache = CompactCache(
            backend, manifest.text, manifest.cache_dtype, batch, capacities.tolist(), budgets
        )
        return self._cache

    def forget(self) -> None:
        """The next call gets new buffers."""
        self._cache = None


def _features(
    graphs: Graphs,
    images: Sequence[PreparedImage],
    digests: Sequence[bytes],  # noqa: ARG001 - nothing is kept
) -> list[ImageTokens]:
    return graphs.tokens(images)
