"""The token sequence that flows through a traced language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.nn import functional


@dataclass
class TokenSequence:
    """The token sequence between two blocks; rows padded on the right.

    hidden     [B,N,D]
    positions  [B,N] int64 (or [3,B,N]): rotary positions, original ones throughout
    image_id   [B,N] int64: -1 padding, 0 text, m the m-th image
    outputs    further outputs of the graph so far, by name: each reduction's map
    ends       [B,N] int64: the last place that each token sees; None: its own
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    image_id: torch.Tensor
    outputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    ends: torch.Tensor | None = None

    def last(self) -> torch.Tensor:
        """Index of each row's last prompt token, [B] int64."""
        return self.length() - 1

    def borders(self) -> torch.Tensor:
        """Tokens on both sides of every border between text and image, [B,N] bool."""
        image = (self.image_id > 0).long()
        count = image.shape[1]
        place = torch.arange(count, device=image.device)
        # Nothing is beyond the ends. With shorter slices torch's exporter would fix the length.
        beside = functional.pad(image, (1, 1))
        before = (image != beside[:, :count]) & (place > 0)
        behind = (image != beside[:, 2 : 2 + count]) & (place < count - 1)
        return before | behind

    def seen_at(self, index: torch.Tensor) -> torch.Tensor:
        """The last place that each of the tokens at ``index`` [B,R] sees, int64; -1 where that is
        below 0."""
        if self.ends is None:
            return index.clamp(min=-1)
        return torch.where(index < 0, -1, self.ends.gather(1, index.clamp(min=0)))

    def length(self) -> torch.Tensor:
        """Tokens of each row, [B] int64."""
        return (self.image_id >= 0).sum(1)
