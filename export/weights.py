"""The weights of a bundle: stored once, shared by its graphs, streamed tensor by tensor.

A linear layer of torch multiplies with the transposed weight; ONNX Runtime would fold that
Transpose into a second copy per session. So a weight that every graph uses transposed is stored
transposed, and the Transpose nodes go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from lvlm.export.checkpoint import Checkpoint
from lvlm.export.tracing import TracedGraph
from lvlm.runtime.bundle import File

WEIGHTS = "weights.bin"
ALIGNMENT = 4096  # a page, so that a reader can map single tensors
IR_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the weights file."""

    parameter: str
    shape: tuple[int, ...]  # as stored
    transposed: bool
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


def plan(graphs: Sequence[TracedGraph], transposed: set[str], dtype: torch.dtype) -> list[Entry]:
    """Where each tensor lies, in the order the graphs first use them."""
    entries: dict[str, Entry] = {}
    end = 0
    for graph in graphs:
        for name, value in graph.parameters.items():
            if name in entries or value.shape is None:
                continue
            shape = tuple(value.shape.numpy())
            nbytes = dtype.itemsize
            for size in shape:
                nbytes *= size
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            entries[name] = Entry(name, shape, name in transposed, offset, nbytes)
            end = offset + nbytes
    return list(entries.values())


def attach(graphs: Sequence[TracedGraph], entries: Sequence[Entry], dtype: torch.dtype) -> None:
    """Point every graph's initializers at the weights file."""
    places = {e.parameter: e for e in entries}
    for graph in graphs:
        for name, value in graph.parameters.items():
            entry = places[name]
            value.const_value = ir.ExternalTensor(
                WEIGHTS,
                entry.offset,
                entry.nbytes,
                IR_TYPES[dtype],
                shape=ir.Shape(entry.shape),
                name=name,
            )


def write(
    path: Path,
    entries: Sequence[Entry],
    checkpoint: Checkpoint,
    stored_names: Mapping[str, str],
    dtype: torch.dtype,
    progress: Callable[[int], None],
    rounding: torch.dtype | None = None,
) -> File:
    """Stream every tensor from the checkpoint to ``path``; its hash and size.

    ``rounding`` first rounds to a narrower type: the fp32 twin of a bf16 bundle.
    """
    digest, position = hashlib.sha256(), 0
    with path.open("wb") as file:
        for entry in entries:
            tensor = checkpoint.read(stored_names[entry.parameter])
            if rounding is not None:
                tensor = tensor.to(rounding)
            tensor = tensor.to(dtype)
            if entry.transposed:
                tensor = tensor.t()
            data = tensor.contiguous().view(torch.uint8).numpy().data
            for chunk in (bytes(entry.offset - position), data):
                file.write(chunk)
                digest.update(chunk)
            position = entry.offset + entry.nbytes
            progress(entry.nbytes)
    return File(digest.hexdigest(), position)
