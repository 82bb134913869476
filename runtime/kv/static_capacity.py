"""Lengths of caches that engines fix: those of the bundle, rounded up so that rows are aligned."""

from __future__ import annotations

import math
from dataclasses import replace

from lvlm.runtime.bundle.engine_sets import ALIGNMENT
from lvlm.runtime.bundle.entry_form import ITEM_BYTES, entry_width
from lvlm.runtime.bundle.manifest import Capacity, Manifest
from lvlm.runtime.kv.cache import SCORES

STEP = 16  # entries: tiles of kernels


def static_capacity(manifest: Manifest) -> Capacity:
    """The capacity of a backend whose graphs fix it (``Backend.static_capacity``)."""
    dtype = manifest.cache_dtype
    width = entry_width(manifest.text.head_dim, dtype)
    entry = manifest.text.kv_heads * width * ITEM_BYTES[dtype]
    scored = manifest.cache_policy is not None and manifest.cache_policy.received
    return aligned_capacity(manifest.capacity, entry, scored=scored)


def aligned_capacity(capacity: Capacity, entry: int, *, scored: bool) -> Capacity:
    """Layers' lengths rounded up so that every row of a buffer begins at a multiple of ALIGNMENT.

    Args:
        entry: bytes of a key, or value, of one layer.
        scored: whether attention received is kept beside the entries.
    """
    sizes = [entry, ITEM_BYTES[SCORES]] if scored else [entry]
    step = math.lcm(STEP, *(ALIGNMENT // math.gcd(ALIGNMENT, size) for size in sizes))
    return replace(capacity, per_layer=tuple(-(-c // step) * step for c in capacity.per_layer))
