"""GPTQ: a weight rounded column by column, each column's error made up for by those after it.

Rounding to the nearest numbers keeps the weight W near, GPTQ what the layer gives for the inputs x
that it gets: of |x (W - Q)|² they count through their second moments H = Σ xᵀx alone. Once a column
is rounded, the best change of the columns that are still free follows from the inverse of H
(Frantar et al., GPTQ, arXiv 2210.17323; their damping, and a Cholesky factor of the inverse). The
scale of a block is, of some that are smaller than round-to-nearest's, the one with the least error
where each input counts by its own moment.

Columns are rounded in their order: a bundle's blocks are runs of them, which act-order would break.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lvlm.core.errors import ExportError
from lvlm.export.checkpoint.quantized.parts.packed_tensor import Unpacked
from lvlm.export.weights.quantization import WeightQuantization

METHOD = "gptq"
DAMPING = 0.01  # of the mean of H's diagonal, added to it
SHRINKS = tuple(1 - step / 40 for step in range(17))  # of the widest scale: down to 0.6


class Moments:
    """The sum [K,K] of xᵀx over the inputs x [K] that a layer gets."""

    def __init__(self, inputs: int) -> None:
        self.sum = torch.zeros(inputs, inputs)

    def add(self, rows: torch.Tensor) -> None:
        """``rows`` [..., K] in any floating type."""
        flat = rows.reshape(-1, rows.shape[-1]).float()
        self.sum.addmm_(flat.t(), flat)

    def weighing(self) -> Weighing:
        """The weighing of these inputs, damped, for rounding. The sum is used up. Raises
        ExportError where it is not finite, or too near to singular."""
        damped, self.sum = self.sum, torch.empty(0)
        mean = damped.diagonal().mean().item()
        damped.diagonal().add_(DAMPING * mean if mean else 1)  # of layers that never got anything
        if not damped.isfinite().all():
            raise ExportError(
                "the model computes numbers that are not finite from the calibration samples; "
                "leave --calibrate out"
            )
        important = damped.diagonal().clone()
        # H = M Mᵀ with M upper triangular, from a factor of H in reverse order, so that
        # inverse(H) = Uᵀ U with U = inverse(M): no inverse of H itself, which fp32 may not hold
        reverse, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if failed:
            raise ExportError(
                "the calibration samples give a layer of this model inputs that fp32 cannot tell "
                "apart; give more and longer samples, or leave --calibrate out"
            )
        reverse = reverse.flip(0, 1)
        eye = torch.eye(len(reverse))
        return Weighing(important, torch.linalg.solve_triangular(reverse, eye, upper=True))


@dataclass(frozen=True)
class Weighing:
    """Weights of inputs in rounding: ``important`` [K], their own moments, and ``factor`` [K,K],
    the upper Cholesky factor of the inverse of all."""

    important: torch.Tensor
    factor: torch.Tensor

    def gptq(self, weight: torch.Tensor, how: WeightQuantization, scales: torch.dtype) -> Unpacked:
        """The numbers and scales that stand for a weight [N,K] of any floating type.

        Args:
            scales: the dtype that a bundle has them in.

        Returns:
            Numbers uint8 [N,K], scales fp32 [N, K / block], all zero points halfway.
        """
        left = weight.detach().to(torch.float32, copy=True)  # columns to round, errors made up for
        outputs, inputs = left.shape
        numbers = torch.empty(outputs, inputs, dtype=torch.uint8)
        found = torch.empty(outputs, inputs // how.block)
        for first in range(0, inputs, how.block):
            block = slice(first, first + how.block)
            columns, factor = left[:, block], self.factor[block, block]
            scale = block_scale(columns, self.important[block], how).to(scales).float()
            errors = torch.empty_like(columns)
            for at in range(how.block):
                rounded = nearest(columns[:, at], scale, how)
                errors[:, at] = (columns[:, at] - rounded * scale) / factor[at, at]
                columns[:, at + 1 :].addr_(errors[:, at], factor[at, at + 1 :], alpha=-1)
                numbers[:, first + at] = rounded + how.zero_point
            left[:, block.stop :].addmm_(errors, self.factor[block, block.stop :], alpha=-1)
            found[:, first // how.block] = scale
        return Unpacked(numbers, found, None)


def block_scale(
    columns: torch.Tensor, important: torch.Tensor, how: WeightQuantization
) -> torch.Tensor:
    """The scale [N] of one block of columns [N, block].

    The widest one is round-to-nearest's: the number farthest from zero becomes the lowest, since
    there is one number more below zero than above. A smaller one cuts it off.
    """
    farthest = columns.gather(1, columns.abs().argmax(1, keepdim=True))[:, 0]
    widest = farthest / -how.zero_point
    best, min_error = widest, torch.full_like(widest, torch.inf)
    for shrink in SHRINKS:
        scale = widest * shrink
        off = columns - nearest(columns, scale[:, None], how) * scale[:, None]
        error = off.square_() @ important
        best = torch.where(error < min_error, scale, best)
        min_error = torch.minimum(error, min_error)
    return best


def nearest(values: torch.Tensor, scale: torch.Tensor, how: WeightQuantization) -> torch.Tensor:
    """The nearest numbers, counted from the zero point; 0 where the scale is 0."""
    times = torch.where(scale == 0, 0, 1 / scale)
    return (values * times).round_().clamp_(-how.zero_point, how.zero_point - 1)
