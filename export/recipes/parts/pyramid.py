"""The pyramid of image tokens: at some blocks those that get little attention are merged away.

The rules are this project's definition of LightVLM (docs/recipes.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from lvlm.export.ops.token_importance import OP as TOKEN_IMPORTANCE
from lvlm.export.ops.token_merge.contract import OP as TOKEN_MERGE
from lvlm.export.ports import GraphPort
from lvlm.export.recipes.parts.sequence import TokenSequence
from lvlm.export.recipes.recipe import TokenReduction
from lvlm.export.standard_ops import Tap
from lvlm.runtime.bundle.manifest import Reduction

Importance = Literal["last", "text"]
Merge = Literal["recycle", "nearest", "drop"]


@dataclass(frozen=True)
class Pyramid(TokenReduction):
    """Image tokens merged at the input of the blocks ``stages``.

    schedule    fraction of the original tokens left after each; None: keep ** (i / n)
    importance  what scores the tokens in the block before: the last prompt token, or the text
    merge       what becomes of discarded tokens; ``recycle``: the fraction of the kept ones that
                are centres, of which each absorbs at most ``absorb``
    """

    stages: tuple[int, ...]
    schedule: tuple[float, ...] | None
    importance: Importance
    merge: Merge
    recycle: float
    absorb: int

    def reductions(self) -> tuple[Reduction, ...]:
        stages = self.stages
        recycle = self.recycle if self.merge == "recycle" else None
        ratios = self.schedule or (None,) * len(stages)
        return tuple(
            Reduction(
                layer=layer,
                exponent=(i + 1) / len(stages) if ratio is None else None,
                ratio=ratio,
                recycle=recycle,
            )
            for i, (layer, ratio) in enumerate(zip(stages, ratios, strict=True))
        )

    def inputs(self) -> list[GraphPort]:
        ports = []
        if self.importance == "text":
            ports.append(GraphPort("query_count", torch.int64, ("batch",)))
            ports.append(GraphPort("query_slots", torch.int64, ("queries",)))
        for i in range(len(self.stages)):
            ports.append(GraphPort(f"keep_{i}", torch.int64, ("batch", "images_per_row")))
            ports.append(GraphPort(f"keep_slots_{i}", torch.int64, (f"kept_{i}",)))
            ports.append(GraphPort(f"out_slots_{i}", torch.int64, (f"length_{i}",)))
            if self.merge == "recycle":
                ports.append(GraphPort(f"recycle_{i}", torch.int64, ("batch", "images_per_row")))
                ports.append(GraphPort(f"recycle_slots_{i}", torch.int64, (f"centres_{i}",)))
        return ports

    def before_block(
        self,
        layer: int,
        state: TokenSequence,
        tap: Tap | None,
        inputs: Mapping[str, torch.Tensor],
    ) -> TokenSequence:
        if layer not in self.stages or tap is None:
            return state
        stage = self.stages.index(layer)
        rows = self._query_rows(state, inputs)
        picked = rows.clamp(min=0)[:, None, :, None]
        picked = picked.expand(-1, tap.query.shape[1], -1, tap.query.shape[3])
        (importance,) = TOKEN_IMPORTANCE(
            tap.query.gather(2, picked),
            tap.key,
            rows,
            state.image_id,
            scale=tap.scale,
        )
        hidden, positions, image_id, old_to_new = TOKEN_MERGE(
            state.hidden,
            importance,
            state.image_id,
            state.positions,
            inputs[f"keep_{stage}"],
            inputs[f"keep_slots_{stage}"],
            inputs[f"out_slots_{stage}"],
            inputs.get(f"recycle_{stage}"),
            inputs.get(f"recycle_slots_{stage}"),
            merge=self.merge,
            absorb=self.absorb,
        )
        return TokenSequence(hidden, positions, image_id, [*state.maps, old_to_new])

    def _query_rows(self, state: TokenSequence, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Indices of the queries that score the tokens, [B,R]; -1: an unused row."""
        last = state.last()[:, None]
        if self.importance == "last":
            return last
        # The text after the last image is the row's tail at every stage: only images shrink.
        slots = inputs["query_slots"][None]
        return torch.where(slots < inputs["query_count"][:, None], last - slots, -1)
