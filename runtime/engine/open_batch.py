"""Opening of a bundle for many requests: its graphs, and a cache with a slot for each request."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lvlm.runtime.backends import Backend
from lvlm.runtime.bundle.manifest import Capacity, Manifest
from lvlm.runtime.engine.batch import Batch
from lvlm.runtime.engine.image_cache import ImageCache
from lvlm.runtime.engine.slots import Slots
from lvlm.runtime.generate.loaded_graphs import Graphs
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.cache import CompactCache


def open_batch(
    folder: Path,
    manifest: Manifest,
    backend: Backend,
    capacity: Capacity,
    slots: int,
    kv_keep: float | None,
    images: ImageCache,
    *,
    reuse_prefixes: bool,
    in_pieces: bool,
) -> Batch:
    """An empty batch with ``slots`` rows of ``capacity``, all of them allocated; what Batch calls
    ``in_pieces``.

    Raises BackendError, DeviceMemoryError.
    """
    on_demand = ["prefill"] if in_pieces else [] if manifest.in_place else ["extend"]
    graphs = Graphs(folder, manifest, backend, on_demand)
    cache = CompactCache(
        backend,
        manifest.text,
        manifest.cache_dtype,
        slots,
        capacity.per_layer,
        Budgets.of(manifest.cache_policy, manifest.text.layers, kv_keep),
    )
    shared = (manifest.in_place or manifest.question_free) and not manifest.text.bidirectional
    rows = Slots(
        cache,
        keeps_prefixes=reuse_prefixes and shared,
        in_place=manifest.in_place,
    )
    return Batch(graphs, rows, partial(images.tokens, graphs.tokens), in_pieces=in_pieces)
