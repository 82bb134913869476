"""Models whose weights stay as they are stored, mapped from their files, and that compute in fp32.

A MatMul reads a few rows of its weight at a time, so that a model of any size needs little memory
above the page cache. What is small, and what is no linear layer, is made fp32 once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

AT_ONCE = 1 << 24  # numbers of a weight that are in memory as fp32 at a time
Read = Callable[[torch.Tensor], torch.Tensor]  # rows as stored -> rows in fp32


class StoredLinear(nn.Linear):
    """A linear layer whose ``weight`` is as stored; ``read`` makes rows of it fp32."""

    read: Read

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        parts = [nn.functional.linear(input, rows) for rows in weight_rows(self)]
        out = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return out if self.bias is None else out + self.bias


class StoredEmbedding(nn.Embedding):
    """A table whose ``weight`` is as stored; what is looked up is made fp32."""

    read: Read

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.read(super().forward(input))


def weight_rows(linear: nn.Linear) -> Iterator[torch.Tensor]:
    """The weight fp32 [N,K] of a layer, stored or not, some rows at a time."""
    count = max(1, AT_ONCE // linear.in_features)
    for rows in torch.split(linear.weight, count):
        yield linear.read(rows) if isinstance(linear, StoredLinear) else rows.float()


# The layers, and from how many numbers on their weight stays in its file
STORED: dict[type[nn.Module], tuple[type[StoredLinear] | type[StoredEmbedding], int]] = {
    nn.Linear: (StoredLinear, 1 << 20),
    nn.Embedding: (StoredEmbedding, 1 << 24),
}


@torch.no_grad()
def compute_in_fp32(model: nn.Module, rounding: torch.dtype = torch.float32) -> nn.Module:
    """The same ``model``, computing in fp32 with its weights rounded to ``rounding``.

    Weights that are neither fp32 nor small, of layers in STORED, are left where they lie.
    """

    def read(rows: torch.Tensor) -> torch.Tensor:
        return rows.to(rounding).float()

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            exact = parameter.dtype == rounding == torch.float32
            kind, large = STORED.get(type(module), (None, 0))
            if exact or not parameter.is_floating_point():
                continue
            if kind is not None and name == "weight" and parameter.numel() >= large:
                module.__class__ = kind
                module.read = read  # type: ignore[assignment]
            else:
                parameter.data = read(parameter.data)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                module._buffers[name] = buffer.float()
    return model.eval().requires_grad_(False)
