"""The graph ``prefill``: prompt to first logits.

A layer's entries are compacted right after the layer, so the full cache of all layers never exists.
"""

from __future__ import annotations

import torch
from torch import nn

from lvlm.export.graphs.attending import Angles, Masks
from lvlm.export.graphs.blocks import PromptEntries, run_block
from lvlm.export.graphs.cache_entries import store
from lvlm.export.graphs.embedded import EmbeddedTokens
from lvlm.export.graphs.graph import Tensors
from lvlm.export.graphs.language_graph import LanguageGraph, logits_at, parts_of
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.graphs.repeats import Described, like, repeated
from lvlm.export.ports import BATCH, GraphPort, one_layer
from lvlm.export.recipes.parts.sequence import TokenSequence
from lvlm.export.recipes.recipe import Recipe
from lvlm.export.standard_ops import Tap


class Prefill(LanguageGraph):
    """Prompt to first logits, writing every layer's cache from slot 0 on.

    input_ids       [B,N] int64, padded on the right
    image_features  [R,(1+deepstack_layers)*D]: the images of all rows; one row of zeros if there
                    is none
    image_row       [B,N] int64: the row of these that replaces a placeholder, -1 for text and
                    padding
    image_id        [B,N] int64: -1 padding, 0 text, m the m-th image of the row
    position_ids    [B,N] int64, or [3,B,N]
    and the recipe's inputs, and the buffers, and the states, which are not read.
    -> logits [B,vocabulary] fp32 after each row's last token, the reductions' maps, with a cache
    rule kept [L,B] int64 (-1: an importance was not finite), the buffers, the states
    """

    name = "prefill"

    def __init__(
        self,
        model: LanguageModel,
        recipe: Recipe,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
    ) -> None:
        super().__init__(model, recipe.cache_rule(), cache_dtype)
        self.parts = parts_of(model)
        self.recipe, self.dtype, self.in_place = recipe, dtype, recipe.in_place

    def inputs(self) -> list[GraphPort]:
        model, row = self.model, (BATCH, "sequence")
        positions = row if model.position_rows == 1 else (3, *row)
        return [
            GraphPort("input_ids", torch.int64, row),
            GraphPort("image_features", self.dtype, ("rows", model.feature_width)),
            GraphPort("image_row", torch.int64, row),
            GraphPort("image_id", torch.int64, row),
            GraphPort("position_ids", torch.int64, positions),
            *self.recipe.inputs(),
            *(self.in_all_layers(self.rule.inputs()) if self.rule else []),
            *self.buffer_ports("past", self.kinds),
            *self.state_ports("past"),
        ]

    def outputs(self) -> list[GraphPort]:
        return [
            GraphPort("logits", torch.float32, (BATCH, self.model.vocab)),
            *self.recipe.outputs(),
            *(self.in_all_layers(self.rule.outputs()) if self.rule else []),
            *self.buffer_ports("present", self.kinds),
            *self.state_ports("present"),
        ]

    def compute(self, given: Tensors) -> dict[str, torch.Tensor]:
        model, recipe, rule = self.model, self.recipe, self.rule
        embedded = EmbeddedTokens(model, given)
        state = TokenSequence(embedded.hidden, given["position_ids"], given["image_id"])
        start = torch.zeros_like(given["input_ids"][:, 0])
        outputs: dict[str, torch.Tensor] = {}
        kept: list[torch.Tensor] = []
        tap: Tap | None = None
        angles, masks = Angles(), Masks(bidirectional=model.bidirectional)
        # No recipe merges where layers keep states (export_plan.py): rows stay as long as they are
        last = {"last": state.last()} if model.states else {}
        states: list[Tensors] = []
        for layer, one in model.numbered():
            if one.states:
                state.hidden, own = self.stateful(
                    layer, one, state.hidden, given, first=True, **last
                )
                states.append(own)
                continue
            state = recipe.before_block(layer, state, tap, given)
            cos, sin = angles.of(one.rotary, state.hidden, state.positions)
            # Elsewhere no layer's window hides anything (cache_plan.py)
            mask = masks.of(one.window if self.in_place else None, state.image_id)
            ranks = rule is not None or recipe.reductions()
            ends = state.ends = masks.ends(state.image_id) if ranks else None
            taken = {
                "hidden": state.hidden,
                "positions": state.positions,
                "image_id": state.image_id,
                "cos": cos,
                "sin": sin,
                "start": start,
                **({} if mask is None else {"mask": mask}),
                **({} if ends is None or rule is None else {"ends": ends}),
                **self.past(layer, given),
                **(one_layer(rule.inputs(), layer, given) if rule else {}),
            }
            new = repeated(self._block, one.block, taken, self._described(taken))
            tap = Tap(scale=model.scale, softcap=model.softcap)
            tap.query, tap.key = new.pop("tap_query"), new.pop("tap_key")
            if rule is not None and rule.scores_all:
                tap.importance = new.pop("importance")
            if rule is not None:
                kept.append(new.pop("kept"))
            state.hidden = new.pop("hidden")
            outputs |= self.present(layer, new)
            # No recipe merges before the last block with features (export_plan.py)
            state.hidden = embedded.with_features(layer, state.hidden)
        outputs |= self.stored(given, states, start)
        outputs |= {"logits": logits_at(model, state.hidden, state.last()), **state.outputs}
        return outputs | ({"kept": torch.stack(kept)} if kept else {})

    def _described(self, taken: Tensors) -> dict[str, Described]:
        """Outputs of ``_block``: a block's tap, its output, with a cache rule how many entries
        stay, its buffers."""
        model, rule, hidden = self.model, self.rule, taken["hidden"]
        (batch, length, _), dtype = hidden.shape, hidden.dtype
        described: dict[str, Described] = {
            "tap_query": (dtype, (batch, model.heads, length, model.head_dim)),
            "tap_key": (dtype, (batch, model.kv_heads, length, model.head_dim)),
            "hidden": like(hidden),
        }
        if rule is not None and rule.scores_all:
            described["importance"] = torch.float32, (batch, length)
        if rule is not None:
            described["kept"] = torch.int64, (batch,)
        return described | {kind: like(taken[kind]) for kind in self.kinds}

    def _block(
        self,
        block: nn.Module,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        image_id: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        start: torch.Tensor,
        mask: torch.Tensor | None = None,
        ends: torch.Tensor | None = None,
        **own: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """A block, and what its cache keeps of the prompt; ``own``: its buffers, the rule's
        inputs."""
        rule = self.rule
        state = TokenSequence(hidden, positions, image_id, ends=ends)
        scored = rule is not None and rule.scores_all
        tap, entries = Tap(state.length() if scored else None, ends), PromptEntries()
        state.hidden = run_block(block, hidden, positions, (cos, sin), entries, tap, mask)
        found, new = {}, {"key": entries.key, "value": entries.value}
        if rule is not None:
            stays = rule.compact_prompt(state, tap, **new, inputs=own)
            found["kept"], new = stays.kept, {"key": stays.key, "value": stays.value}
            if stays.received is not None:
                new["received"] = stays.received
            if rule.queries:
                new["query"] = rule.ring(state, tap)
        if scored:
            found["importance"] = tap.importance
        found |= {kind: store(own[kind], x, start) for kind, x in new.items()}
        return {"tap_query": tap.query, "tap_key": tap.key, "hidden": state.hidden, **found}
