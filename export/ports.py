"""Inputs and outputs of graphs as they are declared: name, element type, dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lvlm.runtime.bundle.manifest import Port

BATCH = "batch"  # the one dynamic dimension that layers share


@dataclass(frozen=True)
class GraphPort:
    """One input or output of a graph; a dimension that is a name is dynamic (inside the exporter
    also a multiple of one, 4*name)."""

    name: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]

    def for_manifest(self) -> Port:
        return Port(self.name, str(self.dtype).removeprefix("torch."), self.dims)


@dataclass(frozen=True)
class LayerPort:
    """A port that a graph has for each layer: a port ``name_l`` of its own, or a row of the
    port ``name`` that all layers share (``stacked``).

    dims  of one layer; a dynamic one is the layer's own, too, unless it is the batch
    """

    name: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]
    stacked: bool = False

    def of(self, layer: int) -> str:
        """The name of the port that has this layer's."""
        return self.name if self.stacked else f"{self.name}_{layer}"


def all_layers(ports: Sequence[LayerPort], layers: int) -> list[GraphPort]:
    """The ports of a graph for these of each layer: the stacked ones, then layer by layer."""
    stacked = [GraphPort(p.name, p.dtype, (layers, *p.dims)) for p in ports if p.stacked]
    own = [
        GraphPort(p.of(layer), p.dtype, tuple(_own(size, layer) for size in p.dims))
        for layer in range(layers)
        for p in ports
        if not p.stacked
    ]
    return [*stacked, *own]


def one_layer(
    ports: Sequence[LayerPort], layer: int, given: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """One layer's part of a graph's inputs, by the names that ``ports`` have."""
    return {p.name: given[p.name][layer] if p.stacked else given[p.of(layer)] for p in ports}


def _own(size: int | str, layer: int) -> int | str:
    return size if isinstance(size, int) or size == BATCH else f"{size}_{layer}"
