"""The graph ``decode``: one token per row to the next logits."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from lvlm.export.graphs.attending import Angles
from lvlm.export.graphs.attention_received import after_one
from lvlm.export.graphs.blocks import CacheWriter, run_block
from lvlm.export.graphs.cache_entries import store
from lvlm.export.graphs.graph import Tensors
from lvlm.export.graphs.language_graph import LanguageGraph, logits_of, parts_of
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.graphs.repeats import like, repeated
from lvlm.export.ports import BATCH, GraphPort, LayerPort, one_layer
from lvlm.export.recipes.parts.cache_rule import CacheRule
from lvlm.export.standard_ops import Tap

SLOTS = [
    LayerPort("write_index", torch.int64, (BATCH,), stacked=True),
    LayerPort("valid_length", torch.int64, (BATCH,), stacked=True),
]


class Decode(LanguageGraph):
    """One token per row to the next logits, writing one cache entry per layer in place.

    input_ids, position_ids [B,1] int64; write_index, valid_length [L,B] int64: the slot that takes
    the new entry and how many slots are valid with it; with a ring of queries query_index [B]
    int64, the slot of the ring that takes the new query; then the buffers. Scores that go on do
    so with what the token attends to. Then the states.
    -> logits [B,vocabulary] fp32, the buffers, the states
    """

    name = "decode"

    def __init__(
        self, model: LanguageModel, rule: CacheRule | None, cache_dtype: torch.dtype
    ) -> None:
        super().__init__(model, rule, cache_dtype)
        self.parts = parts_of(model)

    def inputs(self) -> list[GraphPort]:
        return [
            GraphPort("input_ids", torch.int64, (BATCH, 1)),
            GraphPort("position_ids", torch.int64, (BATCH, 1)),
            *self.in_all_layers(SLOTS),
            *([GraphPort("query_index", torch.int64, (BATCH,))] if self.queries else []),
            *self.buffer_ports("past", self.kinds),
            *self.state_ports("past"),
        ]

    def outputs(self) -> list[GraphPort]:
        return [
            GraphPort("logits", torch.float32, (BATCH, self.model.vocab)),
            *self.buffer_ports("present", self.kinds),
            *self.state_ports("present"),
        ]

    def compute(self, given: Tensors) -> dict[str, torch.Tensor]:
        model, positions = self.model, given["position_ids"]
        hidden = model.embed(given["input_ids"])
        angles = Angles()
        sums = self.rule is not None and self.rule.sums
        bodies = {one.window: partial(_block, window=one.window, sums=sums) for one in model.layers}
        ring = {"query_index": given["query_index"]} if self.queries else {}
        outputs: dict[str, torch.Tensor] = {}
        states: list[Tensors] = []
        for layer, one in model.numbered():
            if one.states:
                hidden, state = self.stateful(layer, one, hidden, given)
                states.append(state)
                continue
            cos, sin = angles.of(one.rotary, hidden, positions)
            turned = {"positions": positions, "cos": cos, "sin": sin}
            own = self.past(layer, given)
            taken = {"hidden": hidden, **turned, **own, **one_layer(SLOTS, layer, given), **ring}
            described = {name: like(taken[name]) for name in ("hidden", *own)}
            written = repeated(bodies[one.window], one.block, taken, described)
            hidden = written.pop("hidden")
            outputs |= self.present(layer, written)
        outputs |= self.stored(given, states, torch.zeros_like(given["input_ids"][:, 0]))
        outputs["logits"] = logits_of(model, hidden[:, 0])
        return outputs


def _block(
    block: nn.Module,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    write_index: torch.Tensor,
    valid_length: torch.Tensor,
    query: torch.Tensor | None = None,
    query_index: torch.Tensor | None = None,
    received: torch.Tensor | None = None,
    *,
    window: int | None,
    sums: bool,
) -> dict[str, torch.Tensor]:
    """A block on one token per row, and its buffers with the token's entry."""
    slots = torch.arange(key.shape[2], device=hidden.device)
    seen = slots[None] < valid_length[:, None]
    if window is not None:  # all entries are there, in order
        seen = seen.logical_and(slots[None] >= valid_length[:, None] - window)
    mask = seen[:, None, None]
    cache, tap = CacheWriter(key, value, write_index), Tap()
    hidden = run_block(block, hidden, positions, (cos, sin), cache, tap, mask)
    written = {"hidden": hidden, "key": cache.key, "value": cache.value}
    if query is not None and query_index is not None:
        written["query"] = store(query, tap.query, query_index)
    if received is not None:
        scores = after_one(received, key, cache, tap, valid_length, sums=sums)
        written["received"] = store(received, scores, torch.zeros_like(write_index))
    return written
