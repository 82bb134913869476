"""The attention that entries of a cache got, beside them [B,1,C,1] fp32: how it goes on.

Of all queries so far, added up (H2O, arXiv 2306.14048), or of the newest alone (TOVA, arXiv
2401.06104). Prefill begins it (recipes/parts/cache_rule.py); what lies behind the valid entries is
anything.
"""

from __future__ import annotations

import torch

from lvlm.export.graphs.blocks import CacheWriter
from lvlm.export.graphs.cache_entries import as_computed, as_held
from lvlm.export.ops.cache_importance import OP as CACHE_IMPORTANCE
from lvlm.export.standard_ops import Tap


def after_one(
    received: torch.Tensor,
    past: torch.Tensor,
    cache: CacheWriter,
    tap: Tap,
    valid_length: torch.Tensor,
    *,
    sums: bool,
) -> torch.Tensor:
    """Attention of all slots with what a token attends to whose entry is the last valid one.

    Its key comes before those of ``past`` [B,Hkv,C,d], the buffer as it was: what has been written
    is for attention alone to read, which targets rely on that write otherwise.
    """
    dtype = tap.query.dtype
    keys = as_computed(torch.cat([as_held(cache.new_key, past.dtype), past], dim=2), dtype)
    index = valid_length - 1
    found = _received(tap.query, keys, index[:, None], valid_length, tap)
    slots = torch.arange(past.shape[2], device=past.device)
    before = received[:, 0, :, 0] + found[:, 1:] if sums else found[:, 1:]
    own = torch.where(slots == index[:, None], found[:, :1], 0)
    return torch.where(slots < index[:, None], before, own)[:, None, :, None]


def after_some(
    received: torch.Tensor, past_slots: torch.Tensor, tap: Tap, *, sums: bool
) -> torch.Tensor:
    """Attention of the entries in ``past_slots`` [P] and of T new tokens behind them, [B,1,P+T,1],
    with what these attend to: themselves and all before."""
    there, tokens = past_slots.shape[0], tap.query.shape[2]
    rows = torch.zeros_like(received[:, 0, :1, 0], dtype=torch.int64)
    index = rows + there + torch.arange(tokens, device=received.device)
    query, length = tap.query, rows[:, 0] + there + tokens
    if not sums:
        query, index = query[:, :, -1:], index[:, -1:]
    found = _received(query, tap.key, index, length, tap)
    if sums:
        before = received[:, 0, :, 0].index_select(1, past_slots)
        found = torch.cat([before + found[:, :there], found[:, there:]], dim=1)
    return found[:, None, :, None]


def _received(
    query: torch.Tensor, key: torch.Tensor, index: torch.Tensor, length: torch.Tensor, tap: Tap
) -> torch.Tensor:
    # So few queries need no loop.
    (found,) = CACHE_IMPORTANCE(query, key, index, length, **tap.logits, parts=1)
    return found
