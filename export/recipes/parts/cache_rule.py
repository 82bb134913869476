"""A cache policy in a graph: one layer at a time, right after the layer.

The policy itself is data (runtime/policies/policy.py), its score ranks a layer's entries
(score_graphs.py), and CacheCompact selects among them. Both the prefill graph and, where a policy
compacts at intervals, compact.onnx are traced from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from lvlm.export.ops.cache_compact.contract import OP as CACHE_COMPACT
from lvlm.export.ports import BATCH, LayerPort
from lvlm.export.recipes.parts.head_rows import by_heads, each_head, heads_as_rows
from lvlm.export.recipes.parts.score_graphs import RankedLayer, importance
from lvlm.export.recipes.parts.sequence import TokenSequence
from lvlm.export.standard_ops import Tap
from lvlm.runtime.policies.policy import CachePolicy

ABOVE_ALL = 1e30  # finite, and more than any sum of attention
Positions = Literal["true", "layer0"]
Semantics = Literal["paper", "reference"]


@dataclass(frozen=True)
class Compacted:
    """Entries that a layer keeps.

    key, value  [B,Hkv,K,d]
    kept        [B] int64: how many entries that is of each row; -1: an importance was not finite
    received    [B,1,K,1] fp32: the attention they got, where the score goes on with it
    """

    key: torch.Tensor
    value: torch.Tensor
    kept: torch.Tensor
    received: torch.Tensor | None = None


@dataclass(frozen=True)
class CacheRule:
    """A policy as graph code."""

    cache_policy: CachePolicy

    @property
    def queries(self) -> int:
        """Most recent queries that each layer remembers in a ring [B,Hq,queries,d]."""
        return self.cache_policy.queries

    @property
    def remembers_prompts(self) -> bool:
        """True where queries of the prompt are still in the ring when the cache is compacted."""
        interval = self.cache_policy.interval
        return interval is not None and interval < self.queries

    @property
    def scores_all(self) -> bool:
        """True where the importance is taken from all prompt queries."""
        return self.cache_policy.score.over_prompt

    @property
    def received(self) -> bool:
        """True where the attention that each entry got lies beside it [B,1,C,1]."""
        return self.cache_policy.received

    @property
    def sums(self) -> bool:
        """True where that is a sum over all queries so far."""
        return self.cache_policy.sums

    def inputs(self) -> list[LayerPort]:
        """Further inputs of the graphs that compact: what a layer keeps of each row, and 0 … K-1,
        K the most of them."""
        return [
            LayerPort("kv_budget", torch.int64, (BATCH,), stacked=True),
            LayerPort("kv_slots", torch.int64, ("entries",)),
        ]

    def outputs(self) -> list[LayerPort]:
        """Further outputs of them: how many entries stayed (-1: an importance was not finite)."""
        return [LayerPort("kept", torch.int64, (BATCH,), stacked=True)]

    def window(
        self, state: TokenSequence, tap: Tap, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The queries [B,Hq,count,d] of each row's last tokens, the last one at the end, and the
        last place [B,count] that each sees; -1: the prompt is shorter."""
        back = torch.arange(count - 1, -1, -1, device=state.hidden.device)
        index = state.last()[:, None] - back
        return tap.queries_at(index), state.seen_at(index)

    def ring(self, state: TokenSequence, tap: Tap) -> torch.Tensor:
        """The prompt's queries that each layer remembers, [B,Hq,queries,d]."""
        return self.window(state, tap, self.queries)[0]

    def compact_prompt(
        self,
        state: TokenSequence,
        tap: Tap,
        key: torch.Tensor,
        value: torch.Tensor,
        inputs: Mapping[str, torch.Tensor],
    ) -> Compacted:
        """Keys and values [B,Hkv,N,d] of one layer to what it keeps. ``inputs`` are the layer's."""
        score = self.cache_policy.score
        queries, index = None, None
        if score.prompt_window:
            queries, index = self.window(state, tap, score.prompt_window)
        received = tap.importance if self.scores_all else None
        entries = RankedLayer(key, state.length(), queries, index, tap.logits, received)
        within = self.cache_policy.select.within_modality
        return self._compact(entries, value, inputs, state.borders() if within else None)

    def compact_buffers(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        queries: torch.Tensor | None,
        received: torch.Tensor | None,
        logits: Mapping[str, float],
        inputs: Mapping[str, torch.Tensor],
    ) -> Compacted:
        """The same for a layer's buffers [B,Hkv,C,d] between two decode steps; with its ring of
        queries, or the attention its entries got [B,1,C,1]."""
        length, index = inputs["valid_length"], inputs.get("query_slot")
        scores = None if received is None else received[:, 0, :, 0]
        entries = RankedLayer(key, length, queries, index, logits, scores)
        return self._compact(entries, value, inputs)

    def _compact(
        self,
        entries: RankedLayer,
        value: torch.Tensor,
        inputs: Mapping[str, torch.Tensor],
        first: torch.Tensor | None = None,
    ) -> Compacted:
        """``first`` [B,N] bool: what stays before any other entry that is not protected."""
        policy, key = self.cache_policy, entries.key
        length, budget = entries.length, inputs["kv_budget"]
        scores = importance(policy.score, entries, policy.recent)
        if first is not None:
            first = first if scores.dim() == 2 else first[:, None]
            scores = torch.where(first, ABOVE_ALL, scores)
        heads = key.shape[1]
        own = scores.dim() == 3
        if own:
            key, value, scores = heads_as_rows(key), heads_as_rows(value), scores.flatten(0, 1)
            length, budget = each_head(length, heads), each_head(budget, heads)
        new_key, new_value, stay, kept = CACHE_COMPACT(
            key,
            value,
            scores,
            length,
            budget,
            inputs["kv_slots"],
            mode=policy.select.mode,
            sinks=policy.sinks,
            recent=policy.recent,
        )
        if own:
            new_key, new_value = (by_heads(x[:, 0], heads) for x in (new_key, new_value))
            kept = by_heads(kept, heads).amin(1)
        received = None
        if self.received:
            theirs = scores.gather(1, stay.clamp(min=0))
            received = torch.where(stay >= 0, theirs, 0)[:, None, :, None]
        return Compacted(new_key, new_value, kept, received)
