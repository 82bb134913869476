"""A block of the checkpoint's own, run over what stands in for transformers' cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lvlm.export.graphs.cache_entries import as_computed, as_held, store
from lvlm.export.ops.gated_delta_rule import OP as GATED_DELTA_RULE
from lvlm.export.ops.gated_delta_rule.contract import step
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
    """Stands in for transformers' cache in layers that keep states: gives the inputs of a block's
    convolution with those of the tokens before in front, and keeps the last n; runs its linear
    attention from the matrices that are there, and keeps those after.

    Args:
        size: n.
        past: the states before these tokens, [B,1,n,D] and [B,1,Hv*dk,dv]; None: there are none
            before them.
        last: [B] int64, index of each row's last token that is no padding; None: the last of all.
        heads: Hv, where there are matrices.
    """

    kept: torch.Tensor  # [B,1,n,D] after these tokens
    matrices: torch.Tensor | None = None  # [B,Hv,dk,dv] likewise, fp32

    def __init__(
        self,
        size: int,
        past: Sequence[torch.Tensor] | None = None,
        last: torch.Tensor | None = None,
        heads: int = 0,
    ) -> None:
        self.size, self.past, self.last, self.heads = size, past, last, heads

    @property
    def states(self) -> list[torch.Tensor]:
        """After these tokens, each as in ``past``."""
        found = self.matrices
        return [self.kept] if found is None else [self.kept, found.flatten(1, 2)[:, None]]

    def behind(self, new: torch.Tensor) -> torch.Tensor:
        """[B,n+N,D] of the inputs ``new`` [B,N,D]."""
        if self.past is None:
            whole = nn.functional.pad(new, (0, 0, self.size, 0))
        else:
            whole = torch.cat([self.past[0][:, 0].to(new.dtype), new], dim=1)
        if self.last is None:
            kept = whole[:, -self.size :]
        else:
            at = self.last[:, None] + 1 + torch.arange(self.size, device=new.device)
            kept = whole.gather(1, at[..., None].expand(-1, -1, new.shape[2]))
        self.kept = kept[:, None]
        return whole

    def delta_rule(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
    ) -> torch.Tensor:
        """Values [B,N,Hv,dv] that the queries read; all in fp32, as ``lvlm::GatedDeltaRule`` takes
        them."""
        (batch, count, heads, size), width = value.shape, key.shape[3]
        before = self.get_recurrent_state()
        if before is None:
            before = torch.zeros(batch, heads, width, size, device=key.device)
        if isinstance(count, int) and count == 1 and self.last is None:
            groups = heads // key.shape[2]
            read, found = (x[:, 0].repeat_interleave(groups, dim=1) for x in (query, key))
            self.matrices, out = step(read, found, value[:, 0], decay[:, 0], beta[:, 0], before)
            return out[:, None]
        if self.last is None:
            length = torch.full((batch,), count, dtype=torch.int64, device=key.device)
        else:
            length = self.last + 1
        given = query, key, value, decay, beta, before, length
        out, self.matrices = GATED_DELTA_RULE(*given)
        return out

    # As transformers asks for them; there is one prompt then, so nothing is padded

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        """None: the way of transformers' blocks that is for any number of tokens is taken."""

    def update_conv_state(self, new: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """``behind`` with channels before tokens."""
        return self.behind(new.transpose(1, 2)).transpose(1, 2)

    def get_recurrent_state(self, *_: Any, **__: Any) -> torch.Tensor | None:
        """The matrices [B,Hv,dk,dv]; None: there are none."""
        if self.past is None:
            return None
        found = self.past[1][:, 0]
        return found.reshape(found.shape[0], self.heads, -1, found.shape[2])

    def update_recurrent_state(self, matrices: torch.Tensor, *_: Any, **__: Any) -> None:
        """Keep the matrices [B,Hv,dk,dv]."""
        self.matrices = matrices


def run_stateful(
    block: nn.Module,
    hidden: torch.Tensor,
    last: torch.Tensor | None = None,
    before: torch.Tensor | None = None,
    *,
    first: bool = False,
    heads: int = 0,
    **states: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """A block that keeps states: its output ``hidden`` [B,N,D], and the states after it.

    Args:
        states: state_0 [B,1,n,D] and so on, before these tokens; ``first``: there are none before
            them, whatever they are.
        last, heads: see StateBehind.
        before: [B] int64, how many tokens there are before these; of a row with none the states
            are not looked at.
    """
    past = None if first else list(states.values())
    if past is not None and before is not None:
        # In fp32: of a choice in fp16 TensorRT-RTX 1.7's builder finds "uses before defs"
        there = before[:, None, None, None] > 0
        zero = torch.zeros((), device=hidden.device)
        past = [torch.where(there, x.float(), zero).to(x.dtype) for x in past]
    cache = StateBehind(states["state_0"].shape[2], past, last, heads)
    # Of angles, which transformers' layers all are given, these make no use
    out = block(hidden, position_embeddings=None, past_key_values=cache)
    new = zip(states.items(), cache.states, strict=True)
    return {"hidden": out, **{name: x.to(old.dtype) for (name, old), x in new}}


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
