"""Expressions that make the bytes of a stored weight from the checkpoint.

An expression is a tensor of the checkpoint, or what is made of other expressions. It knows its
shape and type without reading anything; ``compute`` reads the checkpoint when the weight is
written, so that one weight at a time is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype


class CheckpointReading:
    """The checkpoint while weights are written.

    Args:
        read: a tensor of the checkpoint by its name there.
        stored: one as its files have it, where that is something else.
    """

    def __init__(
        self,
        read: Callable[[str], torch.Tensor],
        stored: Callable[[str], torch.Tensor] | None = None,
    ) -> None:
        self.read, self.stored = read, stored or read
        self._last: tuple[Any, Any] = None, None

    def once(self, key: object, compute: Callable[[], Any]) -> Any:
        """``compute()``, remembered until another key comes: for weights that are parts of one
        result and lie one after the other."""
        if self._last[0] != key:
            self._last = key, compute()
        return self._last[1]


class Expression(Protocol):
    """A weight as it is stored, row-major. Equal expressions give equal bytes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as the graphs see it."""

    @property
    def dtype(self) -> ir.DataType:
        """The data type as the graphs see it."""

    @property
    def operands(self) -> tuple[Expression, ...]:
        """Expressions that it is made of."""

    def compute(self, reading: CheckpointReading) -> torch.Tensor:
        """A tensor whose elements, row-major, are the bytes stored: of ``shape`` and ``dtype``,
        or packed as uint8 where torch has no such type."""


def nbytes(expression: Expression) -> int:
    """Bytes in the weights file."""
    return -(-math.prod(expression.shape) * expression.dtype.bitwidth // 8)


def sources(expression: Expression) -> frozenset[str]:
    """Names of the checkpoint's tensors that it is made of."""
    if isinstance(expression, CheckpointTensor):
        return frozenset({expression.name})
    return frozenset[str]().union(*map(sources, expression.operands))


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor of the checkpoint as it lies there."""

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType

    @property
    def operands(self) -> tuple[Expression, ...]:
        return ()

    def compute(self, reading: CheckpointReading) -> torch.Tensor:
        return reading.read(self.name)


@dataclass(frozen=True)
class Unary:
    """Made of one expression, whose shape and type it keeps unless a subclass says otherwise."""

    of: Expression

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def dtype(self) -> ir.DataType:
        return self.of.dtype

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Cast(Unary):
    """The same numbers in another type."""

    to: ir.DataType

    @property
    def dtype(self) -> ir.DataType:
        return self.to

    def compute(self, reading: CheckpointReading) -> torch.Tensor:
        return self.of.compute(reading).to(to_torch_dtype(self.to))


@dataclass(frozen=True)
class Transpose(Unary):
    """A matrix with its axes exchanged."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape[::-1]

    def compute(self, reading: CheckpointReading) -> torch.Tensor:
        return self.of.compute(reading).t()


@dataclass(frozen=True)
class Concat:
    """Side by side on the last axis; all of one type, and alike on the other axes."""

    operands: tuple[Expression, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        width = sum(operand.shape[-1] for operand in self.operands)
        return (*self.operands[0].shape[:-1], width)

    @property
    def dtype(self) -> ir.DataType:
        return self.operands[0].dtype

    def compute(self, reading: CheckpointReading) -> torch.Tensor:
        # One after the other into its place: of the parts one at a time is in memory
        found = torch.empty(self.shape, dtype=to_torch_dtype(self.dtype))
        end = 0
        for operand in self.operands:
            begin, end = end, end + operand.shape[-1]
            # Contiguous first: turned straight into its place a matrix takes half as long again
            found[..., begin:end] = operand.compute(reading).contiguous()
        return found


@dataclass(frozen=True)
class Fill:
    """The same byte everywhere; of no tensor of the checkpoint."""

    byte: int
    shape: tuple[int, ...]
    dtype: ir.DataType

    @property
    def operands(self) -> tuple[Expression, ...]:
        return ()

    def compute(self, reading: CheckpointReading) -> torch.Tensor:  # noqa: ARG002
        return torch.full((nbytes(self),), self.byte, dtype=torch.uint8)
