"""Weights that come quantized: their integers are stored as they are, in the bundle's order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor, Unpacked
from lvlm.export.weights.expressions import (
    Cast,
    CheckpointReading,
    CheckpointTensor,
    Concat,
    Expression,
    Transpose,
)
from lvlm.export.weights.quantization import WeightQuantization
from lvlm.export.weights.quantized_weights import NUMBERS, halfway, scales_shape


@dataclass(frozen=True)
class PackedWeight:
    """A weight [K,N] of packed ``parts``, whose outputs lie one after the other."""

    of: Expression
    parts: tuple[PackedTensor, ...]

    @property
    def how(self) -> WeightQuantization:
        """Blocks are powers of two, so that the smallest divides all."""
        blocks = [part.block for part in self.parts]
        return WeightQuantization(self.parts[0].bits, min(b for b in blocks if b is not None))

    def compute(self, reading: CheckpointReading) -> tuple[np.ndarray, np.ndarray]:
        found = self.unpacked(reading)
        return pack(found.numbers, self.how.bits), found.scales.numpy()

    def zero_points(self) -> Expression:
        return halfway(self) if all(part.symmetric for part in self.parts) else ZeroPoints(self)

    def unpacked(self, reading: CheckpointReading) -> Unpacked:
        """All parts, with a scale and a zero point for every block; once for those who ask."""
        found: Unpacked = reading.once(self, lambda: self._unpacked(reading))
        return found

    def _unpacked(self, reading: CheckpointReading) -> Unpacked:
        parts = [part.unpack(reading.stored) for part in self.parts]
        blocks = scales_shape(self)[1]

        def spread(of_groups: torch.Tensor) -> torch.Tensor:
            return of_groups.repeat_interleave(blocks // of_groups.shape[1], dim=1)

        zeros = []
        for part in parts:
            number = torch.full_like(part.scales, self.how.zero_point, dtype=torch.uint8)
            zeros.append(spread(number if part.zero_points is None else part.zero_points))
        return Unpacked(
            torch.cat([part.numbers for part in parts]),
            torch.cat([spread(part.scales) for part in parts]),
            torch.cat(zeros),
        )


@dataclass(frozen=True)
class ZeroPoints:
    """The zero points [N, K / block] of a packed weight."""

    weight: PackedWeight

    @property
    def shape(self) -> tuple[int, ...]:
        return scales_shape(self.weight)

    @property
    def dtype(self) -> ir.DataType:
        return NUMBERS[self.weight.how.bits]

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.weight.of,)

    def compute(self, reading: CheckpointReading) -> torch.Tensor:
        zeros = self.weight.unpacked(reading).zero_points
        assert zeros is not None
        return torch.from_numpy(pack(zeros, self.weight.how.bits))


def pack(numbers: torch.Tensor, bits: int) -> np.ndarray:
    """uint8 [N,K] -> [N, K * bits / 8], the first of two 4-bit numbers in the low half."""
    if bits == 8:
        return numbers.numpy()
    return (numbers[:, 0::2] | numbers[:, 1::2] << 4).numpy()


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack what ``pack`` was given."""
    if bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def parts_of(
    weight: Expression, packed: Mapping[str, PackedTensor]
) -> tuple[PackedTensor, ...] | None:
    """The packed tensors that a weight [K,N] is made of, of equal bits; None where it is made of
    others, or in another way."""
    if isinstance(weight, Concat):
        found = [parts_of(operand, packed) for operand in weight.operands]
        parts = tuple(part for one in found if one is not None for part in one)
        alike = None not in found and len({part.bits for part in parts}) == 1
        return parts if alike else None
    tensor = weight.of.of if isinstance(weight, Transpose) and isinstance(weight.of, Cast) else None
    if isinstance(tensor, CheckpointTensor) and tensor.name in packed:
        return (packed[tensor.name],)
    return None
