"""A block of the checkpoint's own, run over what stands in for transformers' cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lvlm.export.standard_ops import Tap, scatter


class PromptEntries:
    """Stands in for transformers' cache in prefill: holds what a block would cache."""

    key: torch.Tensor  # [B,Hkv,N,d]
    value: torch.Tensor

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.key, self.value = key, value
        return key, value


class CacheWriter:
    """Stands in for transformers' cache in decode: writes one block's entry [B,Hkv,1,d] into its
    buffers and gives these to attend over."""

    new_key: torch.Tensor

    def __init__(self, key: torch.Tensor, value: torch.Tensor, index: torch.Tensor) -> None:
        self.key, self.value, self.index = key, value, index

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.new_key = key
        self.key = store(self.key, key, self.index)
        self.value = store(self.value, value, self.index)
        return self.key.to(key.dtype), self.value.to(key.dtype)


class EntriesBehind:
    """Stands in for transformers' cache in extend: writes a block's new entries [B,Hkv,T,d] into
    its buffers, from slot ``index`` [B] on, and gives those of ``slots`` [P] with the new ones
    behind them [B,Hkv,P+T,d] to attend over."""

    def __init__(
        self, key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, slots: torch.Tensor
    ) -> None:
        self.key, self.value, self.index, self.slots = key, value, index, slots

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        past = [buffer.index_select(2, self.slots) for buffer in (self.key, self.value)]
        self.key = store(self.key, key, self.index)
        self.value = store(self.value, value, self.index)
        keys, values = (
            torch.cat([old.to(new.dtype), new], dim=2)
            for old, new in zip(past, (key, value), strict=True)
        )
        return keys, values


class EntriesKept:
    """Stands in for transformers' cache in extend where entries leave, too: gives those of
    ``slots`` [P] with a block's new ones behind them [B,Hkv,P+T,d] to attend over, rounded as its
    buffers are, and writes those of them that ``written`` [W] says, from slot ``index`` [B] on."""

    def __init__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        index: torch.Tensor,
        slots: torch.Tensor,
        written: torch.Tensor,
    ) -> None:
        self.key, self.value = key, value
        self.index, self.slots, self.written = index, slots, written

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (
            torch.cat([buffer.index_select(2, self.slots), new.to(buffer.dtype)], dim=2)
            for buffer, new in ((self.key, key), (self.value, value))
        )
        self.key = store(self.key, keys.index_select(2, self.written), self.index)
        self.value = store(self.value, values.index_select(2, self.written), self.index)
        return keys.to(key.dtype), values.to(value.dtype)


def store(buffer: torch.Tensor, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``x`` [B,H,n,d], in the buffer's dtype, into ``buffer`` [B,H,C,d] from slot ``index`` on."""
    return scatter(buffer, x.to(buffer.dtype), index)


def run_block(
    block: nn.Module,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    cache: PromptEntries | CacheWriter | EntriesBehind | EntriesKept,
    tap: Tap,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """A block's output [B,N,D]; ``angles`` are cos and sin [B,N,d] of the positions."""
    out = block(
        hidden,
        attention_mask=mask,
        position_ids=positions,
        position_embeddings=angles,
        past_key_values=cache,
        tap=tap,
    )
    assert isinstance(out, torch.Tensor)
    return out
