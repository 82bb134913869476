"""Sums of attention beside a cache's entries, [B,1,C,1] fp32: how they go on with new tokens.

Source: H2O, arXiv 2306.14048. Prefill begins them (recipes/parts/cache_rule.py); what lies behind
the valid entries is anything.
"""

from __future__ import annotations

import torch

from lvlm.export.graphs.blocks import CacheWriter
from lvlm.export.ops.cache_importance import OP as CACHE_IMPORTANCE
from lvlm.export.standard_ops import Tap


def after_one(
    received: torch.Tensor,
    past: torch.Tensor,
    cache: CacheWriter,
    tap: Tap,
    valid_length: torch.Tensor,
) -> torch.Tensor:
    """The sums of all slots with what a token attends to whose entry is the last valid one.

    Its key comes before those of ``past`` [B,Hkv,C,d], the buffer as it was: what has been written
    is for attention alone to read, which targets rely on that write otherwise.
    """
    dtype = tap.query.dtype
    keys = torch.cat([cache.new_key.to(past.dtype), past], dim=2).to(dtype)
    index = valid_length - 1
    found = _received(tap, keys, index[:, None], valid_length)
    slots = torch.arange(past.shape[2], device=past.device)
    before = torch.where(slots < index[:, None], received[:, 0, :, 0] + found[:, 1:], 0)
    sums = torch.where(slots == index[:, None], found[:, :1], before)
    return sums[:, None, :, None]


def after_some(
    received: torch.Tensor, past_slots: torch.Tensor, tap: Tap, tokens: int
) -> torch.Tensor:
    """The sums [B,1,P+T,1] of the entries in ``past_slots`` [P] and of ``tokens`` T behind them,
    with what these attend to: themselves and all before."""
    there = past_slots.shape[0]
    rows = torch.zeros_like(received[:, 0, :1, 0], dtype=torch.int64)
    index = rows + there + torch.arange(tokens, device=received.device)
    found = _received(tap, tap.key, index, rows[:, 0] + there + tokens)
    before = received[:, 0, :, 0].index_select(1, past_slots)
    sums = torch.cat([before + found[:, :there], found[:, there:]], dim=1)
    return sums[:, None, :, None]


def _received(
    tap: Tap, keys: torch.Tensor, index: torch.Tensor, length: torch.Tensor
) -> torch.Tensor:
    # So few queries need no loop.
    (found,) = CACHE_IMPORTANCE(tap.query, keys, index, length, scale=tap.scale, parts=1)
    return found
