"""The weights of a bundle before they are written: how each comes from the checkpoint.

Weight steps (weight_steps.py) change this store, and the graphs with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from lvlm.core.errors import ExportError
from lvlm.export.checkpoint.checkpoint import DTYPES, Checkpoint
from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.weights.expressions import Cast, CheckpointTensor, Expression


@dataclass(frozen=True)
class View:
    """Another reading of a stored weight's bytes, which lowered graphs may take."""

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType


class WeightStore:
    """Store of an expression for every initializer's bytes, in the file's order.

    A name means the same bytes in all graphs.

    Attributes:
        within: names whose bytes are the first ones of another name, which comes before them.
        views: of an initializer, by its name.
    """

    def __init__(self, expressions: Mapping[str, Expression]) -> None:
        self._expressions = dict(expressions)
        self.within: dict[str, str] = {}
        self.views: dict[str, tuple[View, ...]] = {}

    @classmethod
    def of(
        cls,
        graphs: Sequence[TracedGraph],
        checkpoint: Checkpoint,
        stored_names: Mapping[str, str],
        dtype: torch.dtype,
    ) -> Self:
        """Every parameter of freshly traced ``graphs`` as the checkpoint has it, in ``dtype``.

        Args:
            stored_names: parameter -> name of its tensor in the checkpoint.
        """

        def stored(parameter: str) -> Expression:
            name = stored_names[parameter]
            tensor = checkpoint.tensors[name]
            source = CheckpointTensor(name, tensor.shape, from_torch_dtype(DTYPES[tensor.dtype]))
            return Cast(source, from_torch_dtype(dtype))

        return cls({name: stored(name) for graph in graphs for name in graph.parameters})

    def __getitem__(self, name: str) -> Expression:
        return self._expressions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._expressions)

    def order(self, names: Sequence[str]) -> None:
        """Keep ``names`` alone, in their order."""
        self._expressions = {name: self._expressions[name] for name in names}

    def replace(self, graphs: Sequence[TracedGraph], name: str, expression: Expression) -> None:
        """Store something else under ``name``; the initializers of ``graphs`` follow."""
        self._expressions[name] = expression
        for graph in graphs:
            if (value := graph.parameters.get(name)) is not None:
                _describe(value, expression)

    def add(self, graph: TracedGraph, name: str, expression: Expression) -> ir.Value:
        """An initializer of ``graph`` that holds ``expression``; the one of that name, if it has
        one. Raises ExportError if the name stands for something else."""
        if self._expressions.setdefault(name, expression) != expression:
            raise ExportError(f"two different weights are named {name}; a weight step is wrong")
        if name not in graph.parameters:
            value = ir.Value(name=name)
            _describe(value, expression)
            graph.model.graph.initializers[name] = value
            graph.parameters[name] = value
        return graph.parameters[name]

    def drop(self, graph: TracedGraph, name: str) -> None:
        """Take an initializer that no node reads any more out of ``graph``."""
        del graph.parameters[name]
        del graph.model.graph.initializers[name]


def _describe(value: ir.Value, expression: Expression) -> None:
    value.shape = ir.Shape(expression.shape)
    value.type = ir.TensorType(expression.dtype)
