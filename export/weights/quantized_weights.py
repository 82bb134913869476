"""Quantized weights as expressions: numbers and scales of one quantization, and zero points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

from lvlm.export.weights.expressions import Expression, Fill, Reading
from lvlm.export.weights.quantization import WeightQuantization, quantize

NUMBERS = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


@dataclass(frozen=True)
class QuantizedWeight:
    """The quantization of a weight [K,N]."""

    of: Expression
    how: WeightQuantization

    @property
    def scales_shape(self) -> tuple[int, int]:
        """[N, K / block]."""
        inputs, outputs = self.of.shape
        return outputs, inputs // self.how.block

    def compute(self, reading: Reading) -> tuple[np.ndarray, np.ndarray]:
        """``quantize``'s result, once for numbers and scales."""
        found: tuple[np.ndarray, np.ndarray] = reading.once(
            self, lambda: quantize(self.of.compute(reading).float().numpy(), self.how)
        )
        return found


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

    def compute(self, reading: Reading) -> torch.Tensor:
        return torch.from_numpy(self.weight.compute(reading)[0])


@dataclass(frozen=True)
class Scales:
    """The scales [N, K / block] of a quantized weight, in the weight's own type."""

    weight: QuantizedWeight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.scales_shape

    @property
    def dtype(self) -> ir.DataType:
        return self.weight.of.dtype

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.weight.of,)

    def compute(self, reading: Reading) -> torch.Tensor:
        scales = torch.from_numpy(self.weight.compute(reading)[1])
        return scales.to(to_torch_dtype(self.dtype))


def zero_points(weight: QuantizedWeight) -> Fill:
    """A zero point for every scale, all alike."""
    number, bits = weight.how.zero_point, weight.how.bits
    return Fill(number if bits == 8 else number << 4 | number, weight.scales_shape, NUMBERS[bits])
