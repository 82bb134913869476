"""What blocks of a language model attend by: angles and masks, computed once for many layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Angles:
    """cos and sin [B,N,d] of positions, once for each rotary embedding while positions stay."""

    def __init__(self) -> None:
        self._positions: Tensor | None = None
        self._known: dict[int, tuple[Tensor, ...]] = {}

    def of(self, rotary: nn.Module, hidden: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Those of ``positions`` [B,N] or [3,B,N], in the dtype of ``hidden``."""
        if positions is not self._positions:
            self._positions, self._known = positions, {}
        if id(rotary) not in self._known:
            self._known[id(rotary)] = rotary(hidden, position_ids=positions)
        return self._known[id(rotary)]


class Masks:
    """What a prompt's tokens see in layers with a window, once for each window."""

    def __init__(self) -> None:
        self._known: dict[int, Tensor] = {}

    def of(self, window: int | None, hidden: Tensor) -> Tensor | None:
        """Boolean [1,1,N,N] for ``hidden`` [B,N,D]; None: everything up to itself."""
        if window is None:
            return None
        if window not in self._known:
            at = torch.arange(hidden.shape[1], device=hidden.device)
            behind = at[:, None] - at
            self._known[window] = ((behind >= 0) & (behind < window))[None, None]
        return self._known[window]
