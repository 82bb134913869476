"""weights.bin of a bundle: where each weight lies, and its bytes, streamed from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import onnx_ir as ir
import torch

from lvlm.core.errors import ExportError
from lvlm.core.integrity import File
from lvlm.export.checkpoint.checkpoint import Checkpoint
from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.weights.expressions import CheckpointReading, Expression, nbytes
from lvlm.export.weights.hashed_file import HashedFile
from lvlm.export.weights.store import View, WeightStore
from lvlm.runtime.bundle.manifest import Weight

WEIGHTS = "weights.bin"
ALIGNMENT = 4096  # a page, so that a reader can map single tensors


@dataclass(frozen=True)
class StoredWeight:
    """One initializer's place: ``nbytes`` from ``offset`` on, which an earlier weight has written
    already where ``shared``; ``views`` are other readings of them."""

    name: str
    expression: Expression
    offset: int
    shared: bool
    views: tuple[View, ...]

    @property
    def nbytes(self) -> int:
        return nbytes(self.expression)


@dataclass(frozen=True)
class WeightsFile:
    """The weights by name, in the file's order."""

    weights: Mapping[str, StoredWeight]

    @classmethod
    def of(cls, store: WeightStore) -> Self:
        """A place for everything in ``store``, in its order."""
        placed: dict[str, StoredWeight] = {}
        end = 0
        for name in store:
            around = store.within.get(name)
            offset = -(-end // ALIGNMENT) * ALIGNMENT if around is None else placed[around].offset
            views = store.views.get(name, ())
            placed[name] = StoredWeight(name, store[name], offset, around is not None, views)
            end = max(end, offset + placed[name].nbytes)
        return cls(placed)

    @property
    def nbytes(self) -> int:
        """Bytes of what is written, without the gaps."""
        return sum(weight.nbytes for weight in self.weights.values() if not weight.shared)

    def attach(self, graphs: Sequence[TracedGraph]) -> None:
        """Point every graph's initializers at the file. Raises ExportError if a graph wants another
        shape or type than is stored."""
        for graph in graphs:
            for name, value in graph.parameters.items():
                place = self.weights[name]
                shape, dtype = ir.Shape(place.expression.shape), place.expression.dtype
                if (value.shape, value.dtype) != (shape, dtype):
                    raise ExportError(
                        f"{graph.name} takes {name} as {value.dtype} {value.shape}, but it is "
                        f"stored as {dtype} {shape}; a weight step is wrong"
                    )
                value.const_value = ir.ExternalTensor(
                    WEIGHTS, place.offset, place.nbytes, dtype, shape=shape, name=name
                )

    def write(self, folder: Path, checkpoint: Checkpoint, progress: Callable[[int], None]) -> File:
        """Stream every weight from the checkpoint into ``folder``.

        Args:
            progress: is told the bytes of each weight that was made and is being written.

        Returns:
            The file's hashes and size.
        """
        reading = CheckpointReading(checkpoint.read, checkpoint.read_stored)
        with HashedFile(folder / WEIGHTS) as file:
            for weight in self.weights.values():
                if weight.shared:
                    continue
                tensor = weight.expression.compute(reading).contiguous()
                if gap := weight.offset - file.bytes:
                    file.write(bytes(gap))
                file.write(_bytes(tensor))
                del tensor  # two are in memory at most: the one being written, the next
                progress(weight.nbytes)
            return file.hashed()

    def table(self) -> dict[str, Weight]:
        """The manifest's list of what lies where, views too: everything that is whole bytes."""
        return {
            name: Weight(WEIGHTS, weight.offset, weight.nbytes, dtype.numpy().name, shape)
            for weight in self.weights.values()
            for name, shape, dtype in _readings(weight)
        }

    def names(self, graph: TracedGraph) -> tuple[str, ...]:
        """Those of the table that ``graph``, or a lowered form of it, reads."""
        held = (self.weights[name] for name in graph.parameters)
        return tuple(name for weight in held for name, _, _ in _readings(weight))


def _readings(weight: StoredWeight) -> Iterator[tuple[str, tuple[int, ...], ir.DataType]]:
    """Name, shape and type of a weight and its views, without numbers of half a byte."""
    own = View(weight.name, weight.expression.shape, weight.expression.dtype)
    for view in (own, *weight.views):
        if view.dtype.bitwidth >= 8:
            yield view.name, view.shape, view.dtype


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
