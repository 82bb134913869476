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
from lvlm.export.ops.token_merge.contract import WITH_CENTRES
from lvlm.export.ports import BATCH, GraphPort
from lvlm.export.recipes.parts.sequence import TokenSequence
from lvlm.export.recipes.recipe import TokenReduction
from lvlm.export.standard_ops import Tap
from lvlm.runtime.bundle.manifest import Reduction

Importance = Literal["last", "text", "both"]
SCORED_BY = "queries that score the tokens: last prompt token, text after the last image, or both"
Merge = Literal["recycle", "nearest", "illava", "drop"]
MERGED_BY = (
    "treatment of discarded tokens: recycle (centres absorb them), illava (centres share them), "
    "nearest, drop"
)
CENTRES = {"recycle": 0.1, "illava": 0.05}
CENTRES_TEXT = "fraction of the kept tokens that are centres, in (0, 1]; default 0.1, illava 0.05"


@dataclass(frozen=True)
class Pyramid(TokenReduction):
    """Image tokens merged at the input of the blocks ``stages``.

    schedule    fraction of the original tokens left after each; None: keep ** (i / n)
    importance  what scores the tokens in the block before: the last prompt token, the text after
                the last image, or both, half and half
    merge       how discarded tokens are treated; with recycle and illava, ``recycle`` is the
                fraction of the kept ones that are centres (None: the rule's own), of which each
                absorbs at most ``absorb``
    """

    stages: tuple[int, ...]
    schedule: tuple[float, ...] | None
    importance: Importance
    merge: Merge
    recycle: float | None
    absorb: int

    def reductions(self) -> tuple[Reduction, ...]:
        stages = self.stages
        recycle = (self.recycle or CENTRES[self.merge]) if self.merge in WITH_CENTRES else None
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
        ports: list[GraphPort] = []
        if self.importance != "last":
            ports.append(GraphPort("query_count", torch.int64, (BATCH,)))
            ports.append(GraphPort("query_slots", torch.int64, ("queries",)))
        for stage in range(len(self.stages)):
            ports += self._counts(stage).values()
        return ports

    def _counts(self, stage: int) -> dict[str, GraphPort]:
        """The graph's inputs of one stage, by the inputs of TokenMerge that they are."""
        images = (BATCH, "images_per_row")
        dims: dict[str, tuple[str, ...]] = {
            "keep": images,
            "keep_slots": (f"kept_{stage}",),
            "out_slots": (f"length_{stage}",),
        }
        if self.merge in WITH_CENTRES:
            dims |= {"recycle": images, "recycle_slots": (f"centres_{stage}",)}
        return {n: GraphPort(f"{n}_{stage}", torch.int64, size) for n, size in dims.items()}

    def outputs(self) -> list[GraphPort]:
        """merge_map_i: old -> new index of each stage's tokens, [B,N before] int64."""
        lengths = ["sequence", *(f"length_{stage}" for stage in range(len(self.stages)))]
        return [
            GraphPort(f"merge_map_{stage}", torch.int64, (BATCH, lengths[stage]))
            for stage in range(len(self.stages))
        ]

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
        importance = self.scores(state, tap, inputs)
        counts = {name: inputs[port.name] for name, port in self._counts(stage).items()}
        hidden, positions, image_id, old_to_new = TOKEN_MERGE(
            state.hidden,
            importance,
            state.image_id,
            state.positions,
            counts["keep"],
            counts["keep_slots"],
            counts["out_slots"],
            counts.get("recycle"),
            counts.get("recycle_slots"),
            merge=self.merge,
            absorb=self.absorb,
        )
        outputs = {**state.outputs, f"merge_map_{stage}": old_to_new}
        return TokenSequence(hidden, positions, image_id, outputs)

    def scores(
        self, state: TokenSequence, tap: Tap, inputs: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Scores that rank the image tokens [B,N] fp32: attention, of the last token, the text, or
        the mean of both."""
        asking, found = list[torch.Tensor](), list[torch.Tensor]()
        if self.importance in ("last", "both"):
            asking.append(state.last()[:, None])
        if self.importance in ("text", "both"):
            asking.append(_text_rows(state, inputs))
        for rows in asking:
            seen, of = state.seen_at(rows), state.image_id
            found += TOKEN_IMPORTANCE(tap.queries_at(rows), tap.key, seen, of, **tap.logits)
        return sum(found[1:], start=found[0]) / len(found)


def _text_rows(state: TokenSequence, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Indices [B,R] of the queries of the text after the last image; -1: an unused row."""
    # It is the row's tail at every stage: only images shrink.
    slots = inputs["query_slots"][None]
    rows = state.last()[:, None] - slots
    return torch.where(slots < inputs["query_count"][:, None], rows, -1)
