"""Inputs and outputs of graphs as they are declared: name, element type, dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lvlm.runtime.bundle.manifest import Port

BATCH = "batch"  # the one dynamic dimension that the inputs of all layers share


@dataclass(frozen=True)
class GraphPort:
    """One input or output of a graph.

    dims  a name: dynamic; inside the exporter also a multiple of one (4*name)
    """

    name: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]

    def manifest(self) -> Port:
        """The port as the manifest has it."""
        return Port(self.name, str(self.dtype).removeprefix("torch."), self.dims)


@dataclass(frozen=True)
class LayerPort:
    """What a graph takes or gives for every layer: one port ``name_l`` for each, or, where it is
    ``stacked``, one port ``name`` with a row for each.

    dims  of one layer; a dynamic one other than the batch is each layer's own
    """

    name: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]
    stacked: bool = False

    def of(self, layer: int) -> str:
        """The name of the port that has this layer's."""
        return self.name if self.stacked else f"{self.name}_{layer}"


def all_layers(ports: Sequence[LayerPort], layers: int) -> list[GraphPort]:
    """The graph's ports for these of each layer: stacked ones, then layer by layer."""
    stacked = [GraphPort(p.name, p.dtype, (layers, *p.dims)) for p in ports if p.stacked]
    own = [
        GraphPort(p.of(layer), p.dtype, tuple(_own(d, layer) for d in p.dims))
        for layer in range(layers)
        for p in ports
        if not p.stacked
    ]
    return [*stacked, *own]


def one_layer(
    ports: Sequence[LayerPort], layer: int, given: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What one layer takes of a graph's inputs, by its ports' names."""
    return {p.name: given[p.name][layer] if p.stacked else given[p.of(layer)] for p in ports}


def _own(size: int | str, layer: int) -> int | str:
    return size if isinstance(size, int) or size == BATCH else f"{size}_{layer}"
