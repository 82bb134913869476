"""Key heads as rows of a batch, where each head has a choice of entries of its own."""

from __future__ import annotations

import torch


def heads_as_rows(states: torch.Tensor) -> torch.Tensor:
    """[B,H,N,d] as [B*H,1,N,d]."""
    return states.flatten(0, 1)[:, None]


def by_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """[B*heads,...] as [B,heads,...]."""
    return states.reshape(-1, heads, *states.shape[1:])


def grouped_queries(queries: torch.Tensor, key_heads: int) -> torch.Tensor:
    """[B,Hq,R,d] as [B*Hkv,Hq/Hkv,R,d]: query heads beside those that read the same keys."""
    heads, count, width = queries.shape[1:]
    return queries.reshape(-1, heads // key_heads, count, width)


def each_head(counts: torch.Tensor, heads: int) -> torch.Tensor:
    """Counts [B,...] of each row for each of its heads, [B*heads,...]."""
    return counts.repeat_interleave(heads, dim=0)
