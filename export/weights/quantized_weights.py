"""Quantized weights as expressions: numbers and scales of one quantization, and zero points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

from lvlm.export.weights.expressions import CheckpointReading, Expression, Fill
from lvlm.export.weights.quantization import WeightQuantization, quantize

NUMBERS = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


class QuantizedWeight(Protocol):
    """The quantization of a weight [K,N]. Equal ones give equal bytes."""

    @property
    def of(self) -> Expression:
        """The weight that it stands for."""

    @property
    def how(self) -> WeightQuantization: ...

    def compute(self, reading: CheckpointReading) -> tuple[np.ndarray, np.ndarray]:
        """Packed numbers uint8 [N, K * bits / 8] and scales fp32 [N, K / block]."""

    def zero_points(self) -> Expression:
        """[N, K / block]; of no operands where they are alike."""


@dataclass(frozen=True)
class RoundedWeight:
    """A weight [K,N] rounded to the nearest numbers."""

    of: Expression
    how: WeightQuantization

    def compute(self, reading: CheckpointReading) -> tuple[np.ndarray, np.ndarray]:
        """``quantize``'s result, once for numbers and scales."""
        found: tuple[np.ndarray, np.ndarray] = reading.once(
            self, lambda: quantize(self.of.compute(reading).float().numpy(), self.how)
        )
        return found

    def zero_points(self) -> Fill:
        return halfway(self)


@dataclass(frozen=True)
class Numbers:
    """The packed numbers [N,K] of a quantized weight."""

    weight: QuantizedWeight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.of.shape[::-1]

    @property
    def dtype(self) -> ir.DataType:
        return NUMBERS[self.weight.how.bits]

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.weight.of,)

    def compute(self, reading: CheckpointReading) -> torch.Tensor:
        return torch.from_numpy(self.weight.compute(reading)[0])


@dataclass(frozen=True)
class Scales:
    """The scales [N, K / block] of a quantized weight, in the weight's own type."""

    weight: QuantizedWeight

    @property
    def shape(self) -> tuple[int, ...]:
        return scales_shape(self.weight)

    @property
    def dtype(self) -> ir.DataType:
        return self.weight.of.dtype

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.weight.of,)

    def compute(self, reading: CheckpointReading) -> torch.Tensor:
        scales = torch.from_numpy(self.weight.compute(reading)[1])
        return scales.to(to_torch_dtype(self.dtype))


def halfway(weight: QuantizedWeight) -> Fill:
    """A zero point for every scale, all alike."""
    number, bits = weight.how.zero_point, weight.how.bits
    byte = number if bits == 8 else number << 4 | number
    return Fill(byte, scales_shape(weight), NUMBERS[bits])


def scales_shape(weight: QuantizedWeight) -> tuple[int, int]:
    """[N, K / block]."""
    inputs, outputs = weight.of.shape
    return outputs, inputs // weight.how.block
