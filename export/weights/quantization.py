"""Weight-only quantization: blocks of a weight's input axis, by ONNX Runtime's own quantizer.

Its result is stored once and has two readers. Standard ONNX sees a tensor of uint4 or uint8 [N,K]
that DequantizeLinear spreads again; ONNX Runtime's MatMulNBits sees the same bytes as
[N, K / block, block * bits / 8] and never spreads them in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lvlm.core.errors import ParameterError
from lvlm.export.checkpoint.quantized.parts.packed_tensor import BLOCKS
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.weights.stored_weights import Read, StoredLinear

KINDS = {"int8": 8, "int4": 4}  # what --weights takes, in bits
ZERO_POINTS_SUFFIX = ".zero_points"  # of a weight's name: those that are not all alike
BLOCKS_SUFFIX = ".blocks"  # appended to a name: the same bytes as MatMulNBits reads them


@dataclass(frozen=True)
class WeightQuantization:
    """Each run of ``block`` numbers of one output shares a scale; ``bits`` is 4 or 8. ``whole``, of
    8 bits: all blocks of an output have the same.

    Symmetric: a stored number q stands for (q - zero_point) * scale.
    """

    bits: int
    block: int
    whole: bool = False

    @property
    def zero_point(self) -> int:
        """Halfway, for every block: MatMulNBits takes it for granted."""
        return 1 << (self.bits - 1)

    def blocks(self, outputs: int, inputs: int) -> tuple[int, int, int]:
        """The packed weight [outputs, inputs] as bytes: outputs, blocks, bytes of a block."""
        return outputs, inputs // self.block, self.block * self.bits // 8

    def check(self, name: str, inputs: int) -> None:
        """ParameterError unless ``inputs``, the numbers per output of weight ``name``, fill their
        blocks: a padded last block would be no tensor of standard ONNX."""
        if inputs % self.block == 0:
            return
        fit = [] if self.whole else [str(size) for size in BLOCKS if inputs % size == 0]
        mend = f"give --block-size {' or '.join(fit)}" if fit else "leave --weights out"
        raise ParameterError(
            f"{name} has {inputs} inputs, which blocks of {self.block} do not divide; {mend}"
        )


def quantize(weight: np.ndarray, how: WeightQuantization) -> tuple[np.ndarray, np.ndarray]:
    """Packed uint8 [N, K * bits / 8] (the first of two 4-bit numbers in the low half of a byte) and
    scales fp32 [N, K / block] of a weight [K,N], as MatMul takes it."""
    if how.whole:
        return _whole_outputs(weight, how)
    inputs, outputs = weight.shape
    packed = np.zeros(how.blocks(outputs, inputs), np.uint8)
    scales = np.zeros(packed.shape[:2], np.float32)
    unused = np.zeros((outputs, -(-scales.shape[1] * how.bits // 8)), np.uint8)  # zero points
    rows = np.ascontiguousarray(weight, np.float32)
    _quantizer(how.bits)(packed, rows, scales, unused, how.block, outputs, inputs, True)
    return packed.reshape(outputs, -1), scales


def _whole_outputs(weight: np.ndarray, how: WeightQuantization) -> tuple[np.ndarray, np.ndarray]:
    """``quantize``, rounded to the nearest of 255 numbers of one scale for each output."""
    rows = np.ascontiguousarray(weight.T, np.float32)
    max_code = how.zero_point - 1
    scales = np.abs(rows).max(axis=1, keepdims=True) / max_code
    numbers = np.rint(rows / np.where(scales == 0, 1, scales)) + how.zero_point
    return numbers.astype(np.uint8), np.repeat(scales, rows.shape[1] // how.block, axis=1)


def _quantizer(bits: int) -> Callable[..., Any]:
    """The function that onnxruntime.quantization's MatMulNBitsQuantizer calls: that class itself
    takes whole models, and weights are streamed here."""
    from onnxruntime.capi import _pybind_state

    function: Callable[..., Any] = getattr(_pybind_state, f"quantize_matmul_{bits}bits")
    return function


def dequantize(packed: np.ndarray, scales: np.ndarray, how: WeightQuantization) -> np.ndarray:
    """The weight fp32 [K,N] that ``quantize``'s result stands for, as DequantizeLinear has it."""
    outputs, blocks = scales.shape
    numbers = packed if how.bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1)
    centred = numbers.reshape(outputs, blocks, how.block).astype(np.float32) - how.zero_point
    spread: np.ndarray = centred * scales.astype(np.float32)[:, :, None]
    return spread.reshape(outputs, -1).T


def linear_weights(model: nn.Module, language: LanguageModel) -> dict[str, nn.Parameter]:
    """Weights to quantize, by name in ``model``: those [N,K] of every linear layer of the
    blocks, and of the head. Embeddings, norms and the vision tower are not."""
    wanted = {id(linear.weight) for linear in linears(language)}
    parameters = model.named_parameters(remove_duplicate=True)
    return {name: parameter for name, parameter in parameters if id(parameter) in wanted}


def linears(language: LanguageModel) -> list[nn.Linear]:
    linear = [linear for block in language.blocks for linear in linears_of(block)]
    return [*linear, *([language.head] if isinstance(language.head, nn.Linear) else [])]


def linears_of(block: nn.Module) -> list[nn.Linear]:
    return [module for module in block.modules() if isinstance(module, nn.Linear)]


@torch.no_grad()
def round_linears(language: LanguageModel, how: WeightQuantization, scales: torch.dtype) -> None:
    """Give the torch model the numbers that a quantized bundle multiplies with, whose scales have
    the bundle's dtype. A head that shares its weight with the embedding gets one of its own."""
    shared = language.embed.weight
    for linear in linears(language):
        if isinstance(linear, StoredLinear):
            linear.read = _rounding(linear.read, how, scales)
        elif linear.weight is shared:
            rounded = _rounded(linear.weight, how, scales)
            linear.weight = nn.Parameter(rounded, requires_grad=False)
        else:
            # Never in place: the weight may be mapped from the checkpoint's file
            linear.weight.data = _rounded(linear.weight, how, scales)


def _rounding(read: Read, how: WeightQuantization, scales: torch.dtype) -> Read:
    return lambda rows: _rounded(read(rows), how, scales)


def _rounded(rows: torch.Tensor, how: WeightQuantization, scales: torch.dtype) -> torch.Tensor:
    """Any rows of a weight [N,K], each with blocks of its own, in their own dtype."""
    packed, factors = quantize(rows.t().float().numpy(), how)
    rounded = torch.from_numpy(factors).to(scales).float().numpy()
    weight = torch.from_numpy(dequantize(packed, rounded, how).T)
    return weight.to(rows.dtype).contiguous()
