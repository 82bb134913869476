"""Linear layers of a torch model that multiply with a packed weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.weights.quantization import linear_weights, linears
from lvlm.export.weights.stored_weights import StoredLinear


class PackedLinear(nn.Linear):
    """A linear layer whose weight is ``packed`` in a file, and in memory while it is multiplied
    with."""

    packed: PackedTensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, dense(self.packed), self.bias)


def dense(packed: PackedTensor) -> torch.Tensor:
    """The weight fp32 [N,K] of a tensor that reads nothing of a checkpoint."""

    def read(name: str) -> torch.Tensor:
        raise LookupError(name)

    return packed.make(read)


@torch.no_grad()
def exchange_linears(
    model: nn.Module, language: LanguageModel, packed: Mapping[str, PackedTensor]
) -> None:
    """Give the torch model the numbers that a bundle multiplies with: ``packed``, by the parameter
    in ``linear_weights``. A head that shares its weight with the embedding gets one of its own."""
    names = {id(parameter): name for name, parameter in linear_weights(model, language).items()}
    for linear in linears(language):
        tensor = packed[names[id(linear.weight)]]
        if isinstance(linear, StoredLinear):  # large
            linear.__class__ = PackedLinear  # type: ignore[assignment]
            linear.packed = tensor  # type: ignore[assignment]
        else:
            linear.weight = nn.Parameter(dense(tensor), requires_grad=False)
