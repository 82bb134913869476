"""How a recipe compresses the cache: one layer at a time, right after the layer.

What the runtime must know is data (``Compression``); what happens in a graph is here. Both the
prefill graph and, where a recipe compacts at intervals, compact.onnx are traced from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from lvlm.core.errors import ParameterError
from lvlm.export.ops.cache_compact.contract import OP as CACHE_COMPACT
from lvlm.export.ops.cache_importance import OP as CACHE_IMPORTANCE
from lvlm.export.recipes._sequence import GraphInput, TokenSequence
from lvlm.export.standard_ops import Tap
from lvlm.runtime.bundle.manifest import Compression

Positions = Literal["true", "layer0"]
Semantics = Literal["paper", "reference"]
Compacted = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class CacheRule:
    """Which entries stay (``mode`` of CacheCompact), and the counts' rules for the runtime.

    Scored by the attention of all prompt queries, or, with ``compression.queries``, of the most
    recent ones, which each layer then remembers in a ring [B,Hq,queries,d].
    """

    compression: Compression
    mode: Literal["evict", "merge", "merge-reference"] = "evict"

    @property
    def queries(self) -> int:
        return self.compression.queries

    @property
    def scores_all(self) -> bool:
        """Whether the importance is taken from all prompt queries."""
        return self.queries == 0

    def inputs(self, layers: int) -> list[GraphInput]:
        """Further inputs of the graphs that compact: what every layer keeps of each row."""
        budget = GraphInput("kv_budget", torch.int64, (layers, "batch"))
        slots = [GraphInput(f"kv_slots_{i}", torch.int64, (f"entries_{i}",)) for i in range(layers)]
        return [budget, *slots]

    def ring(self, state: TokenSequence, tap: Tap) -> tuple[torch.Tensor, torch.Tensor]:
        """The queries [B,Hq,queries,d] of each row's last tokens, the last one at the end, and the
        index [B,queries] of each; -1: the prompt is shorter."""
        back = torch.arange(self.queries - 1, -1, -1, device=state.hidden.device)
        index = state.last()[:, None] - back
        picked = index.clamp(min=0)[:, None, :, None]
        picked = picked.expand(-1, tap.query.shape[1], -1, tap.query.shape[3])
        return tap.query.gather(2, picked), index.clamp(min=-1)

    def compact_prompt(
        self,
        layer: int,
        state: TokenSequence,
        tap: Tap,
        key: torch.Tensor,
        value: torch.Tensor,
        inputs: Mapping[str, torch.Tensor],
    ) -> Compacted:
        """Keys and values [B,Hkv,N,d] of one layer to what it keeps, [B,Hkv,K,d], and how many
        entries that is per row, [B]: -1 where an importance was not finite."""
        length = state.length()
        if self.scores_all:
            importance = tap.importance
        else:
            queries, index = self.ring(state, tap)
            importance = self._recent_importance(queries, key, index, length, tap.scale)
        return self._compact(key, value, importance, length, layer, inputs)

    def compact_buffers(
        self,
        layer: int,
        queries: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        inputs: Mapping[str, torch.Tensor],
    ) -> Compacted:
        """The same for a layer's buffers [B,Hkv,C,d] between two decode steps."""
        length, index = inputs["valid_length"][layer], inputs["query_slot"][layer]
        importance = self._recent_importance(queries, key, index, length, scale)
        return self._compact(key, value, importance, length, layer, inputs)

    def _recent_importance(
        self,
        queries: torch.Tensor,
        key: torch.Tensor,
        index: torch.Tensor,
        length: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        # So few queries need no loop.
        (importance,) = CACHE_IMPORTANCE(queries, key, index, length, scale=scale, parts=1)
        return importance

    def _compact(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        importance: torch.Tensor,
        length: torch.Tensor,
        layer: int,
        inputs: Mapping[str, torch.Tensor],
    ) -> Compacted:
        new_key, new_value, _, kept = CACHE_COMPACT(
            key,
            value,
            importance,
            length,
            inputs["kv_budget"][layer],
            inputs[f"kv_slots_{layer}"],
            mode=self.mode,
            sinks=self.compression.sinks,
            recent=self.compression.recent,
        )
        return new_key, new_value, kept


def cap_above(cap: int | None, protected: int) -> None:
    """ParameterError unless an absolute cap leaves room for what is protected."""
    if cap is None:
        return
    if not isinstance(cap, int) or isinstance(cap, bool) or cap < protected:
        raise ParameterError(
            f"kv_cap is {cap!r}, but {protected} entries are protected; give a whole number of "
            f"{protected} or more"
        )
