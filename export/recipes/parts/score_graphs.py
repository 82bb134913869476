"""Graph code of the scores by which a layer's entries are ranked (runtime/policies/scores.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce, singledispatch

import torch
from torch.nn import functional

from lvlm.export.ops.cache_importance import OP as CACHE_IMPORTANCE
from lvlm.export.recipes.parts.head_rows import by_heads, each_head, grouped_queries, heads_as_rows
from lvlm.runtime.policies.scores import Accumulated, AllQueries, Latest, Recency, Score, Window


@dataclass(frozen=True)
class RankedLayer:
    """One layer's entries when they are ranked.

    key      [B,Hkv,N,d]
    length   [B] int64: how many of them are valid
    queries  [B,Hq,R,d]: the most recent ones, where the score is a window of these
    index    [B,R] int64: of each query's own entry, -1: there is none
    logits   attributes of ops that make them as attention does
    received [B,N] fp32: the attention they got, where the score asks for it and that is known
    """

    key: torch.Tensor
    length: torch.Tensor
    queries: torch.Tensor | None
    index: torch.Tensor | None
    logits: Mapping[str, float]
    received: torch.Tensor | None = None


@singledispatch
def importance(score: Score, layer: RankedLayer, recent: int) -> torch.Tensor:
    """The importance [B,N] fp32 of a layer's entries, or [B,Hkv,N] where each key head ranks its
    own; the last ``recent`` entries stay whatever it says."""
    raise NotImplementedError(score)


@importance.register(AllQueries)
@importance.register(Accumulated)
def _(score: AllQueries | Accumulated, layer: RankedLayer, recent: int) -> torch.Tensor:
    del score, recent
    assert layer.received is not None
    return layer.received


@importance.register
def _(score: Latest, layer: RankedLayer, recent: int) -> torch.Tensor:
    del score
    if layer.received is not None:
        return layer.received
    return importance(Window(1), layer, recent)


@importance.register
def _(score: Window, layer: RankedLayer, recent: int) -> torch.Tensor:
    assert layer.queries is not None
    assert layer.index is not None
    queries, key, index, length = layer.queries, layer.key, layer.index, layer.length
    heads = key.shape[1]
    if score.per_head:  # each key head with its own queries is a row to the op
        key, queries = heads_as_rows(key), grouped_queries(queries, heads)
        index, length = each_head(index, heads), each_head(length, heads)
    # So few queries need no loop.
    (found,) = CACHE_IMPORTANCE(queries, key, index, length, **layer.logits, parts=1)
    if score.kernel > 1:
        found = _pooled(score, found, length - recent)
    return by_heads(found, heads) if score.per_head else found


@importance.register
def _(score: Recency, layer: RankedLayer, recent: int) -> torch.Tensor:
    del score, recent
    batch, _, entries, _ = layer.key.shape
    ages = torch.arange(entries, device=layer.key.device).float()  # exact up to 2**24 entries
    return ages[None].expand(batch, -1)


def _pooled(score: Window, found: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Scores [B,N] over ``kernel`` neighbouring positions, those from ``end`` [B] on left out."""
    places = torch.arange(found.shape[1], device=found.device)
    before = torch.where(places < end[:, None], found, 0)
    half = score.kernel // 2
    # Written out: torch's exporter takes the length as a constant where it sees a pooling.
    padded = functional.pad(before, (half, half))
    shifted = [padded[:, start : start + found.shape[1]] for start in range(score.kernel)]
    if score.pool == "max":
        return reduce(torch.maximum, shifted)
    return reduce(torch.add, shifted) / score.kernel
