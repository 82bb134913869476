"""A block of the checkpoint's own, run over what stands in for transformers' cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lvlm.export.graphs.cache_entries import as_computed, as_held, store
from lvlm.export.standard_ops import Tap


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
        return as_computed(self.key, key.dtype), as_computed(self.value, key.dtype)


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
            torch.cat([as_computed(old, new.dtype), new], dim=2)
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
            torch.cat([buffer.index_select(2, self.slots), as_held(new, buffer.dtype)], dim=2)
            for buffer, new in ((self.key, key), (self.value, value))
        )
        self.key = store(self.key, keys.index_select(2, self.written), self.index)
        self.value = store(self.value, values.index_select(2, self.written), self.index)
        return as_computed(keys, key.dtype), as_computed(values, value.dtype)


class StateBehind:
    """Stands in for transformers' cache in layers that convolve: gives a block's inputs with those
    of the tokens before them in front, and keeps the last n.

    Args:
        past: [B,1,n,D], the state before these tokens; None: there are none before them.
        size: n.
        last: [B] int64, index of each row's last token that is no padding; None: the last of all.
    """

    state: torch.Tensor  # [B,1,n,D] after these tokens

    def __init__(
        self, past: torch.Tensor | None, size: int, last: torch.Tensor | None = None
    ) -> None:
        self.past, self.size, self.last = past, size, last

    def behind(self, new: torch.Tensor) -> torch.Tensor:
        """[B,n+N,D] of the inputs ``new`` [B,N,D]."""
        if self.past is None:
            whole = nn.functional.pad(new, (0, 0, self.size, 0))
        else:
            whole = torch.cat([self.past[:, 0].to(new.dtype), new], dim=1)
        if self.last is None:
            kept = whole[:, -self.size :]
        else:
            at = self.last[:, None] + 1 + torch.arange(self.size, device=new.device)
            kept = whole.gather(1, at[..., None].expand(-1, -1, new.shape[2]))
        self.state = kept[:, None]
        return whole

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        """None: the way of transformers' blocks that is for any number of tokens is taken."""

    def update_conv_state(self, new: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """``behind`` as transformers asks for it, channels before tokens."""
        return self.behind(new.transpose(1, 2)).transpose(1, 2)


def convolve(
    block: nn.Module,
    hidden: torch.Tensor,
    state: torch.Tensor,
    last: torch.Tensor | None = None,
    before: torch.Tensor | None = None,
    *,
    first: bool = False,
) -> dict[str, torch.Tensor]:
    """A block that convolves: its output ``hidden`` [B,N,D] and the ``state`` after it.

    Args:
        state: [B,1,n,D] before these tokens; ``first``: there are none before them, whatever it is.
        last: see StateBehind.
        before: [B] int64, how many tokens there are before these; of a row with none the state is
            not looked at.
    """
    past = None if first else state
    if past is not None and before is not None:
        # In fp32: of a choice in fp16 TensorRT-RTX 1.7's builder finds "uses before defs"
        there = before[:, None, None, None] > 0
        past = torch.where(there, past.float(), torch.zeros((), device=past.device)).to(past.dtype)
    cache = StateBehind(past, state.shape[2], last)
    out = block(hidden, past_key_values=cache)
    return {"hidden": out, "state": cache.state.to(state.dtype)}


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
