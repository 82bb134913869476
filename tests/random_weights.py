"""Random weights for the checkpoints of the tests: no parameter is left as its layer starts."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Fill every parameter: a bias of 0, a norm of 1 or a scale of 0.1 hides what is left out.

    Args:
        model: Changed in place.
        seed: The same seed gives the same weights.
    """
    draws = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.uniform_(-0.3, 0.3, generator=draws)
        elif parameter.dim() == 1 and name.endswith(("weight", "lambda_1", "lambda_2")):
            parameter.uniform_(0.7, 1.3, generator=draws)  # norms and layer scales
        else:
            # Larger than the usual start: logits must differ by more than rounding.
            parameter.normal_(0, 0.15, generator=draws)
