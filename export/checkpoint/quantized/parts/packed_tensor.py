"""A weight of small integers, which a bundle can hold as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lvlm.export.checkpoint.checkpoint_form import Read

BLOCKS = (16, 32, 64, 128, 256)  # what MatMulNBits takes


@dataclass(frozen=True)
class Unpacked:
    """The parts of a packed weight.

    ``numbers`` uint8 [N,K], ``scales`` fp32 [N,G] and ``zero_points`` uint8 [N,G], None where all
    are halfway: a number q stands for (q - zero_point) * scale of its group of K / G.
    """

    numbers: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None

    def dense(self, bits: int) -> torch.Tensor:
        """The weight fp32 [N,K] that it stands for."""
        outputs, groups = self.scales.shape
        zero = 1 << (bits - 1) if self.zero_points is None else self.zero_points[..., None].float()
        spread = self.numbers.view(outputs, groups, -1).float()  # a copy, changed in place
        return spread.sub_(zero).mul_(self.scales[..., None]).view(outputs, -1)


@dataclass(frozen=True)
class PackedTensor:
    """A weight [N,K] of integers of ``bits`` bits, whose inputs share scales in ``groups`` runs.

    ``symmetric``: without zero points. ``unpack`` reads the parts as the checkpoint has them.
    """

    shape: tuple[int, int]
    bits: int
    groups: int
    symmetric: bool
    unpack: Callable[[Read], Unpacked]
    dtype: str = "F32"  # numbers times scales are exact in it

    @property
    def block(self) -> int | None:
        """Numbers that share a scale in a bundle: a group, or an equal part of one; None where no
        block of MatMulNBits is.

        It wants an even number of zero points of four bits for each output, since it reads whole
        bytes of them, standard ONNX one after the other.
        """
        inputs = self.shape[1]
        if inputs % self.groups:
            return None
        group, half = inputs // self.groups, self.bits == 4 and not self.symmetric
        fit = (b for b in reversed(BLOCKS) if group % b == 0 and not (half and inputs // b % 2))
        return next(fit, None)

    def make(self, read: Read) -> torch.Tensor:
        return self.unpack(read).dense(self.bits)
