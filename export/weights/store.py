"""The weights of a bundle: stored once, shared by its graphs, streamed tensor by tensor.

A linear layer of torch multiplies with the transposed weight; ONNX Runtime would fold that
Transpose into a second copy per session. So a weight that every graph uses transposed is stored
transposed, and the Transpose nodes go. Weights of products that read the same input lie side by
side in one tensor (fused_products.py), quantized ones lie as numbers and scales
(quantized_products.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from lvlm.core.integrity import File, FileHash
from lvlm.export.checkpoint.checkpoint import Checkpoint
from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.weights.quantization import quantize
from lvlm.export.weights.quantized_linears import BLOCKS, QuantizedTensor
from lvlm.runtime.bundle.manifest import Weight

WEIGHTS = "weights.bin"
ALIGNMENT = 4096  # a page, so that a reader can map single tensors
IR_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}


@dataclass(frozen=True)
class Part:
    """A parameter of the checkpoint inside a stored tensor."""

    parameter: str
    transposed: bool


@dataclass(frozen=True)
class StoreEntry:
    """One tensor of the weights file: ``parts`` side by side on their last axis, and where
    ``quantized`` what was computed from them."""

    name: str
    parts: tuple[Part, ...]
    quantized: QuantizedTensor | None
    shape: tuple[int, ...]  # as stored
    dtype: ir.DataType
    offset: int
    nbytes: int


def fold_transposes(graphs: Sequence[TracedGraph]) -> set[str]:
    """Remove Transpose nodes from weights that are used transposed everywhere; their names."""
    uses: dict[str, list[bool]] = {}
    for graph in graphs:
        for name, value in graph.parameters.items():
            uses.setdefault(name, []).extend(_is_transpose(node) for node, _ in value.uses())
    folded = {name for name, all_uses in uses.items() if all(all_uses)}
    for graph in graphs:
        for name in folded & set(graph.parameters):
            value = graph.parameters[name]
            assert value.shape is not None
            value.shape = ir.Shape(reversed(value.shape.dims))
            for node, _ in list(value.uses()):
                node.outputs[0].replace_all_uses_with(value)
                graph.model.graph.remove(node, safe=True)
    return folded


def _is_transpose(node: ir.Node) -> bool:
    permutation = node.attributes.get("perm") if node.op_type == "Transpose" else None
    return permutation is not None and list(permutation.as_ints()) == [1, 0]


def plan(
    graphs: Sequence[TracedGraph],
    transposed: set[str],
    fused: Mapping[str, tuple[str, ...]],
    quantized: Mapping[str, QuantizedTensor],
) -> list[StoreEntry]:
    """Where each tensor lies, in the order the graphs first use them; ``fused`` are those made of
    several parameters. Zero points, which are all alike, lie in one place at the end."""
    entries: dict[str, StoreEntry] = {}
    for graph in graphs:
        for name, value in graph.parameters.items():
            if name in entries or value.shape is None or value.dtype is None:
                continue
            made = quantized.get(name)
            source = name if made is None else made.source
            parts = tuple(Part(p, p in transposed) for p in fused.get(source, (source,)))
            shape = tuple(value.shape.numpy())
            nbytes = -(-math.prod(shape) * value.dtype.bitwidth // 8)
            entries[name] = StoreEntry(name, parts, made, shape, value.dtype, 0, nbytes)
    alike = [e for e in entries.values() if e.quantized and e.quantized.role == "zero points"]
    alike.sort(key=lambda e: -e.nbytes)
    placed, end = [], 0
    for entry in [e for e in entries.values() if e not in alike] + alike[:1]:
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        placed.append(replace(entry, offset=offset))
        end = offset + entry.nbytes
    return placed + [replace(entry, offset=placed[-1].offset) for entry in alike[1:]]


def attach(graphs: Sequence[TracedGraph], entries: Sequence[StoreEntry]) -> None:
    """Point every graph's initializers at the weights file."""
    places = {e.name: e for e in entries}
    for graph in graphs:
        for name, value in graph.parameters.items():
            entry = places[name]
            value.const_value = ir.ExternalTensor(
                WEIGHTS,
                entry.offset,
                entry.nbytes,
                entry.dtype,
                shape=ir.Shape(entry.shape),
                name=name,
            )


def table(entries: Sequence[StoreEntry]) -> dict[str, Weight]:
    """The manifest's list of what lies where: everything that is whole bytes, and packed numbers
    also as the blocks that lowered graphs read."""
    listed = {}
    for e in entries:
        if e.dtype.bitwidth >= 8:
            listed[e.name] = Weight(WEIGHTS, e.offset, e.nbytes, _name(e.dtype), e.shape)
        if e.quantized is not None and e.quantized.role == "numbers":
            dims = e.quantized.how.blocks(*e.shape)
            listed[e.name + BLOCKS] = Weight(WEIGHTS, e.offset, e.nbytes, "uint8", dims)
    return listed


def _name(dtype: ir.DataType) -> str:
    return {v: str(k).removeprefix("torch.") for k, v in IR_TYPES.items()}.get(dtype, "uint8")


def write(
    path: Path,
    entries: Sequence[StoreEntry],
    checkpoint: Checkpoint,
    stored_names: Mapping[str, str],
    dtype: torch.dtype,
    progress: Callable[[int], None],
) -> File:
    """Stream every tensor from the checkpoint to ``path``; its hashes and size."""
    content = _Content(checkpoint, stored_names, dtype)
    found, position = FileHash(), 0
    with path.open("wb") as file:
        for entry in entries:
            if entry.offset < position:
                continue  # zero points that lie there already
            data = content.of(entry).view(torch.uint8).numpy().data
            for chunk in (bytes(entry.offset - position), data):
                file.write(chunk)
                found.update(chunk)
            position = entry.offset + entry.nbytes
            progress(entry.nbytes)
    return found.file()


class _Content:
    """What is stored for an entry; remembers the last quantized weight for its scales."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        stored_names: Mapping[str, str],
        dtype: torch.dtype,
    ) -> None:
        self.checkpoint, self.stored_names = checkpoint, stored_names
        self.dtype = dtype
        self.last: tuple[str, np.ndarray, np.ndarray] | None = None

    def of(self, entry: StoreEntry) -> torch.Tensor:
        made = entry.quantized
        if made is None:
            return self._weight(entry.parts).contiguous()
        if made.role == "zero points":
            number = made.how.zero_point
            byte = number if made.how.bits == 8 else number << 4 | number
            return torch.full((entry.nbytes,), byte, dtype=torch.uint8)
        if self.last is None or self.last[0] != made.source:
            weight = self._weight(entry.parts).float()
            weight = weight.t() if made.outputs_first else weight
            self.last = (made.source, *quantize(weight.numpy(), made.how))
        _, packed, scales = self.last
        if made.role == "numbers":
            return torch.from_numpy(packed)
        return torch.from_numpy(scales).to(self.dtype)

    def _weight(self, parts: Sequence[Part]) -> torch.Tensor:
        tensors = []
        for part in parts:
            tensor = self.checkpoint.read(self.stored_names[part.parameter])
            tensor = tensor.to(self.dtype)
            tensors.append(tensor.t() if part.transposed else tensor)
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=-1)
