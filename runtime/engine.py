"""The graphs of a bundle on one backend, and the cache that batches of prompts use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lvlm.runtime.backends import Backend, Session
from lvlm.runtime.batch import Batch
from lvlm.runtime.budgets import Budgets
from lvlm.runtime.bundle import Manifest
from lvlm.runtime.cache import CompactCache
from lvlm.runtime.sampling import Sampling
from lvlm.runtime.schedule import Keep

CAPACITY_STEP = 64  # cache lengths are rounded up to this, so that buffers are reused


@dataclass(frozen=True)
class Prompt:
    """One row: token ids with every picture's placeholder repeated per image token.

    image_id [N] int64: 0 text, m the m-th picture; pixels float32 [pictures,3,H,W].
    """

    ids: Sequence[int]
    image_id: np.ndarray
    pixels: np.ndarray
    sampling: Sampling
    max_new_tokens: int


class Engine:
    """The graphs of a bundle on one backend. Not thread-safe: one batch at a time."""

    def __init__(self, folder: Path, manifest: Manifest, backend: Backend) -> None:
        self.manifest, self.backend = manifest, backend
        self.vision: Session = backend.load(folder, manifest, "vision")
        self.prefill: Session = backend.load(folder, manifest, "prefill")
        self.decode: Session = backend.load(folder, manifest, "decode")
        self.compact: Session | None = (
            backend.load(folder, manifest, "compact") if "compact" in manifest.graphs else None
        )
        self._cache: CompactCache | None = None

    def start(
        self, prompts: Sequence[Prompt], keep: Keep | None = None, kv_keep: float | None = None
    ) -> Batch:
        """Encode the pictures and prefill every prompt; the ratios are those of generate."""
        return Batch(self, prompts, keep, kv_keep)

    def cache_for(self, batch: int, needed: np.ndarray, budgets: Budgets) -> CompactCache:
        """Buffers for ``needed`` entries per layer; the last ones again where they fit."""
        limits = np.array(self.manifest.capacity.per_layer)
        rounded = -(-needed // CAPACITY_STEP) * CAPACITY_STEP
        capacities = np.minimum(rounded, np.maximum(limits, needed))
        if self.backend.static_capacity:
            capacities = limits  # never less than needed: see new_token_limit
        old = self._cache
        if (
            old is not None
            and old.lengths.shape[1] == batch
            and np.array_equal(old.capacities, capacities)
        ):
            old.reset(budgets)
            return old
        self._cache = old = None  # freed before the new one is allocated
        self._cache = CompactCache(
            self.backend,
            self.manifest.text,
            self.manifest.dtype,
            batch,
            capacities.tolist(),
            budgets,
        )
        return self._cache
