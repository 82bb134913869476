"""The memory that a set of engines takes of a device when they run, from what their file says."""

from __future__ import annotations

from dataclasses import dataclass

from lvlm.core.progress import size
from lvlm.runtime.bundle.engine_sets import EngineSet
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.kv.cache import cache_bytes
from lvlm.runtime.kv.static_capacity import static_capacity


@dataclass(frozen=True)
class EngineMemory:
    """Bytes. ``engines``: code, and the weights that each holds for itself; ``shared``: weights
    that are inputs; ``cache``: of all ``prompts`` that they take at once; ``workspace``: the
    largest that one computes in, 0 where the builder did not say."""

    engines: int
    shared: int
    cache: int
    prompts: int
    workspace: int

    @property
    def total(self) -> int:
        return self.engines + self.shared + self.cache + self.workspace

    def __str__(self) -> str:
        return (
            f"{size(self.engines + self.shared)} of engines and weights, {size(self.cache)} of "
            f"cache for {self.prompts} at once, {size(self.workspace)} of workspace"
        )


def engine_memory(engines: EngineSet, manifest: Manifest) -> EngineMemory:
    """Memory of the set when all of its engines are loaded, which share one workspace."""
    graphs = engines.graphs.values()
    shared = {weight.name: weight.nbytes for graph in graphs for weight in graph.weights}
    batch = engines.graphs["decode"].profile.get("batch") if "decode" in engines.graphs else None
    prompts = 1 if batch is None else batch.max
    return EngineMemory(
        sum(graph.bytes for graph in graphs),
        sum(shared.values()),
        cache_bytes(manifest, prompts, static_capacity(manifest).per_layer),
        prompts,
        max((graph.activations or 0 for graph in graphs), default=0),
    )
