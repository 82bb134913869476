"""One batch of prompts on its way: vision, prefill, then decode steps over a compact cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from lvlm.runtime.generate.call_plan import count_prompts
from lvlm.runtime.generate.loaded_graphs import Graphs, check_kept
from lvlm.runtime.generate.row import Row
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.cache import CompactCache
from lvlm.runtime.options.generation_options import Keep
from lvlm.runtime.prompt.prompts import Prompt

CAPACITY_STEP = 64  # cache lengths are rounded up to this, so that buffers are reused


@dataclass
class Timings:
    """Milliseconds; prefill without vision."""

    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    decode_steps: int = 0


class Batches:
    """Starts batches over one cache, whose buffers are used again. One batch at a time."""

    def __init__(self, graphs: Graphs) -> None:
        self.graphs = graphs
        self._cache: CompactCache | None = None

    @contextmanager
    def run(
        self, prompts: Sequence[Prompt], keep: Keep | None = None, kv_keep: float | None = None
    ) -> Iterator[Batch]:
        """A batch, started; within, it is answered.

        Its buffers serve the next one only if all of it went well: nothing was raised, it was not
        left before the end, and no row overflowed, not even one that nobody looked at any more.
        What lies in buffers beyond a row's own entries would spoil it: 0 times NaN is not 0.
        """
        clean = False
        try:
            batch = self.start(prompts, keep, kv_keep)
            yield batch
            clean = not batch.active and bool(np.isfinite(batch.logits).all())
        finally:
            if not clean:
                self.forget()

    def start(
        self, prompts: Sequence[Prompt], keep: Keep | None = None, kv_keep: float | None = None
    ) -> Batch:
        """Encode the pictures and prefill every prompt; the ratios are those of generate. See
        ``run`` for whom answers matter to."""
        return Batch(self, prompts, keep, kv_keep)

    def cache_for(self, batch: int, needed: np.ndarray, budgets: Budgets) -> CompactCache:
        """Buffers for ``needed`` [L] entries; the last ones again where they fit."""
        manifest, backend = self.graphs.manifest, self.graphs.backend
        limits = np.array(manifest.capacity.per_layer)
        rounded = -(-needed // CAPACITY_STEP) * CAPACITY_STEP
        capacities = np.minimum(rounded, np.maximum(limits, needed))
        if backend.static_capacity:
            capacities = limits  # never less than needed: see new_token_limit
        old = self._cache
        if (
            old is not None
            and old.lengths.shape[1] == batch
            and np.array_equal(old.capacities, capacities)
        ):
            old.reset(budgets)
            return old
        self.forget()
        old = None  # freed before the new one is allocated
        self._cache = CompactCache(
            backend, manifest.text, manifest.cache_dtype, batch, capacities.tolist(), budgets
        )
        return self._cache

    def forget(self) -> None:
        """The next batch gets new buffers."""
        self._cache = None


class Batch:
    """Prompts on their way: ``step`` decodes one token for every row that still runs.

    ``features`` are each picture's [V,D] (bf16 as its bits), ``merge_maps`` old -> new [B,N] of
    each reduction.
    """

    def __init__(
        self,
        owner: Batches,
        prompts: Sequence[Prompt],
        keep: Keep | None,
        kv_keep: float | None,
    ) -> None:
        self.graphs = graphs = owner.graphs
        self.timings = Timings()
        self.counts = count_prompts(graphs.manifest, prompts, keep, kv_keep)
        self.rows = [Row(p, limit) for p, limit in zip(prompts, self.counts.limits, strict=True)]
        fed = np.array(self.counts.limits) - 1  # the last token is never fed back
        budgets = self.counts.budgets
        needed = budgets.capacity(self.counts.prefill.entries, fed)
        self.cache = owner.cache_for(len(prompts), needed, budgets)
        self._prefill(prompts)
        self._decode = graphs.bind("decode", self.cache.buffers)
        self._compact = (
            graphs.bind("compact", self.cache.buffers) if "compact" in graphs.sessions else None
        )

    def _prefill(self, prompts: Sequence[Prompt]) -> None:
        graphs = self.graphs
        began = time.perf_counter()
        self.features = graphs.encode([p for prompt in prompts for p in prompt.pictures])
        self.timings.vision_ms = _since(began)
        began = time.perf_counter()
        self.logits, self.merge_maps = graphs.prefill(
            prompts, self.counts, self.features, graphs.bind("prefill", self.cache.buffers)
        )
        self.cache.begin(self.counts.prefill.entries, self.counts.kept)
        self.timings.prefill_ms = _since(began)

    @property
    def active(self) -> bool:
        return any(row.finish_reason is None for row in self.rows)

    def step(self) -> Iterator[tuple[int, int]]:
        """Choose the next token of every running row and yield (row, token); then decode them."""
        eos = self.graphs.manifest.text.eos_ids
        for index, row in enumerate(self.rows):
            if row.finish_reason is None:
                yield index, row.choose(self.logits[index], eos)
        if self.active:
            self.decode_step()

    def decode_step(self) -> None:
        """Feed every row's newest token; afterwards ``logits`` [B,vocabulary] are the next ones."""
        began = time.perf_counter()
        running = np.array([row.finish_reason is None for row in self.rows])
        inputs = self.cache.decode_inputs(
            np.array([row.tokens[-1] for row in self.rows], np.int64),
            np.array([row.position for row in self.rows], np.int64),
        )
        self._decode(inputs, {"logits": self.logits})
        self.cache.advance(running)
        for row in self.rows:
            row.position += row.finish_reason is None
        self._compact_cache()
        self.timings.decode_ms += _since(began)
        self.timings.decode_steps += 1

    def _compact_cache(self) -> None:
        """Between two steps: drop entries where an interval is over and there are too many."""
        inputs = self.cache.compaction()
        if inputs is None or self._compact is None:
            return
        kept = np.empty_like(inputs["kv_budget"])
        self._compact(inputs, {"kept": kept})
        check_kept(kept, inputs["kv_budget"])
        self.cache.compacted()


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3
