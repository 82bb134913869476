"""Angles and masks that blocks of a language model attend by, computed once for many layers."""

from __future__ import annotations

from typing import Literal

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
    """Masks of what a prompt's tokens see, where that is not everything up to themselves: in layers
    with a window, and where the tokens of an image, or of the prompt, see one another
    (``bidirectional``). Once for each window while the tokens stay."""

    def __init__(self, *, bidirectional: Literal["", "image", "prompt"]) -> None:
        self.bidirectional = bidirectional
        self._image_id: Tensor | None = None
        self._known: dict[int | None, Tensor] = {}
        self._ends: Tensor | None = None

    def of(self, window: int | None, image_id: Tensor) -> Tensor | None:
        """Boolean [B or 1,1,N,N] for tokens of images [B,N]; None: everything up to itself."""
        if self.bidirectional == "prompt":
            window = None  # hides nothing of a prompt, see seen_in_prompt
        if window is None and not self.bidirectional:
            return None
        if image_id is not self._image_id:
            self._image_id, self._known, self._ends = image_id, {}, None
        if window not in self._known:
            if self.bidirectional == "prompt":
                among = seen_in_prompt(image_id)
            else:
                images = image_id if self.bidirectional else None
                among = seen_among(image_id.shape[1], window, images, image_id)
            self._known[window] = among[:, None]
        return self._known[window]

    def ends(self, image_id: Tensor) -> Tensor | None:
        """The last place [B,N] int64 that each token sees in a layer without a window; None: its
        own."""
        if not self.bidirectional:
            return None
        seen = self.of(None, image_id)
        if self._ends is None and seen is not None:
            last = seen[:, 0].sum(-1) - 1
            self._ends = torch.where(image_id >= 0, last, -1)
        return self._ends


def seen_in_prompt(image_id: Tensor) -> Tensor:
    """Boolean [B,N,N]: which of a prompt's tokens each sees where all see one another.

    Source: transformers' PaliGemma, whose prompts are one block, over which windows hide nothing:
    they are for what follows.
    """
    return (image_id >= 0)[:, None].expand(-1, image_id.shape[1], -1)


def seen_among(count: int, window: int | None, image_id: Tensor | None, like: Tensor) -> Tensor:
    """Boolean [B or 1,N,N]: which of so many tokens each of them sees, those up to itself and of
    the window. With ``image_id`` [B,N] (-1 padding, 0 text, m the m-th image) also those of its
    image that follow: a window hides the past alone.

    Source: transformers' create_masks_for_vision_model of Gemma 3. Its images lie apart, each in
    one run of tokens. ``like`` is any tensor of the same device.
    """
    at = torch.arange(count, device=like.device)
    behind = at[:, None] - at
    seen = (behind >= 0)[None]
    if image_id is not None:
        same = image_id[:, :, None] == image_id[:, None]
        # torch's exporter would decompose a graph that has & or | in it, which takes seconds
        seen = seen.logical_or(same.logical_and((image_id > 0)[:, None]))
    return seen if window is None else seen.logical_and(behind < window)
