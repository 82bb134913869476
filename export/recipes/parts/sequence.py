"""The token sequence that flows through a traced language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass
class TokenSequence:
    """The token sequence between two blocks; rows padded on the right.

    hidden     [B,N,D]
    positions  [B,N] int64 (or [3,B,N]): rotary positions, original ones throughout
    image_id   [B,N] int64: -1 padding, 0 text, m the m-th image
    outputs    further outputs of the graph so far, by name: each reduction's map
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    image_id: torch.Tensor
    outputs: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def last(self) -> torch.Tensor:
        """Index of each row's last prompt token, [B] int64."""
        return self.length() - 1

    def length(self) -> torch.Tensor:
        """Tokens of each row, [B] int64."""
        return (self.image_id >= 0).sum(1)
