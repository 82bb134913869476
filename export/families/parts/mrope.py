"""Rotary embeddings of three positions per token (M-RoPE), in a form that graphs take well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class MropeRotary(nn.Module):
    """The rotary embedding of transformers' ``rotary``: each angle turns by one of a token's three
    positions, time, row or column.

    Its own computes the angles of all three and puts together what it wants of them. Qwen3-VL's
    does so in place, which graphs pay with scatters; on what Qwen2-VL's joins TensorRT-RTX 1.7
    crashes where decode ranks a cache by the turned query (docs/tensorrt.md). Here each angle picks
    its position first: the same products.
    """

    def __init__(self, rotary: Any, axis: torch.Tensor) -> None:
        """``axis`` [d / 2] int64: which of the three turns each angle."""
        super().__init__()
        self.rotary = rotary
        self.axis: torch.Tensor
        self.register_buffer("axis", axis, persistent=False)

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B,N] or [3,B,N] int64 -> cos and sin [B,N,d] in x's dtype."""
        if position_ids.dim() == 2:
            own = position_ids[..., None]
        else:
            own = position_ids.index_select(0, self.axis).permute(1, 2, 0)
        angles = own.float() * self.rotary.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        scale = self.rotary.attention_scaling
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


def one_after_another(section: Sequence[int]) -> torch.Tensor:
    """The axis of so many angles by time, then by row, then by column (Qwen2-VL)."""
    return torch.repeat_interleave(torch.arange(3), torch.tensor(section))


def taking_turns(section: Sequence[int], angles: int) -> torch.Tensor:
    """The axis of angles by time, row and column in turns, as long as there are any of these; the
    rest by time (Qwen3-VL)."""
    axis = torch.zeros(angles, dtype=torch.int64)
    for which in (1, 2):
        axis[which : 3 * section[which] : 3] = which
    return axis
