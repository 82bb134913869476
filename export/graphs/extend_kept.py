"""The graph ``extend`` of recipes that merge or compress: tokens at once, as decode reads them.

For conversations that keep their compressed cache from turn to turn (runtime/engine/session.py).
What decode does with an entry it does by counting: which token takes whose slot is known before any
of them is read. So the host says of every entry how long it is there, and the graph attends and
writes by that: logits and cache are those of one decode step after the other, of however many
tokens at once.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from lvlm.export.graphs.attending import Angles
from lvlm.export.graphs.attention_received import after_some
from lvlm.export.graphs.blocks import EntriesKept, run_block
from lvlm.export.graphs.cache_entries import store
from lvlm.export.graphs.embedded import EmbeddedTokens, new_tokens
from lvlm.export.graphs.graph import Tensors
from lvlm.export.graphs.language_graph import LanguageGraph, logits_at, parts_of
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.graphs.repeats import like, repeated
from lvlm.export.ports import BATCH, GraphPort, LayerPort, one_layer
from lvlm.export.recipes.parts.cache_rule import CacheRule
from lvlm.export.standard_ops import Tap

COUNTS = [
    LayerPort("write_index", torch.int64, (BATCH,), stacked=True),
    LayerPort("new_until", torch.int64, ("tokens",), stacked=True),
    LayerPort("past_slots", torch.int64, ("past",)),
    LayerPort("past_until", torch.int64, ("past",)),
    LayerPort("written", torch.int64, ("written",)),
]


class ExtendKept(LanguageGraph):
    """New tokens to the next logits, as if decode had read one after the other.

    Rows of a batch are alike in all that is counted; the runtime reads one at a time. Of a layer
    with P entries and T new tokens:

    input_ids       [B,T] int64
    image_features  [R,(1+deepstack_layers)*D], image_row [B,T], position_ids [B,T] or [3,B,T],
                    last_token [B]: as in extend.py
    write_index     [L,B] int64: the slot from which on entries are written
    new_until       [L,T] int64: the first new token that does not see the t-th new one's entry any
                    more, because its slot was taken; T: all that follow see it
    past_slots_l    [P] int64: slots of the entries that are there
    past_until_l    [P] int64: of each the first new token that does not see it any more; 0: none
    written_l       [W] int64: what lies in the slots from write_index on afterwards, as an index
                    into these P entries and the T new ones behind them
    ring_slots      [queries] int64, with a ring of queries: what lies in its slots afterwards, as
                    an index into the ring and the T new queries behind it
    and the buffers, the states.
    -> logits [B,vocabulary] fp32 after each row's last token, the buffers, the states
    """

    name = "extend"

    def __init__(
        self,
        model: LanguageModel,
        rule: CacheRule | None,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
    ) -> None:
        super().__init__(model, rule, cache_dtype)  # whose buffers are all that depends on it
        self.parts = parts_of(model)
        self.dtype = dtype

    def inputs(self) -> list[GraphPort]:
        return [
            *new_tokens(self.model, self.dtype),
            *self.in_all_layers(COUNTS),
            *([GraphPort("ring_slots", torch.int64, (self.queries,))] if self.queries else []),
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
        embedded = EmbeddedTokens(model, given)
        hidden, angles = embedded.hidden, Angles()
        ring = {"ring_slots": given["ring_slots"]} if self.queries else {}
        body = partial(_block, sums=self.rule is not None and self.rule.sums)
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
            counts = one_layer(COUNTS, layer, given)
            taken = {"hidden": hidden, **turned, **counts, **ring, **own}
            described = {name: like(taken[name]) for name in ("hidden", *own)}
            written = repeated(body, one.block, taken, described)
            hidden = embedded.with_features(layer, written.pop("hidden"))
            outputs |= self.present(layer, written)
        outputs |= self.stored(given, states, torch.zeros_like(given["last_token"]))
        outputs["logits"] = logits_at(model, hidden, given["last_token"])
        return outputs


def _block(
    block: nn.Module,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    write_index: torch.Tensor,
    new_until: torch.Tensor,
    past_slots: torch.Tensor,
    past_until: torch.Tensor,
    written: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query: torch.Tensor | None = None,
    ring_slots: torch.Tensor | None = None,
    received: torch.Tensor | None = None,
    *,
    sums: bool,
) -> dict[str, torch.Tensor]:
    """A block on the new tokens, and its buffers as decode would leave them."""
    at = torch.arange(hidden.shape[1], device=hidden.device)
    past = at[:, None] < past_until
    own = (at[:, None] >= at).logical_and(at[:, None] < new_until)
    mask = torch.cat([past, own], dim=1)[None, None]  # [1,1,T,P+T]
    cache, tap = EntriesKept(key, value, write_index, past_slots, written), Tap()
    hidden = run_block(block, hidden, positions, (cos, sin), cache, tap, mask)
    found = {"hidden": hidden, "key": cache.key, "value": cache.value}
    # Whole buffers; written as every buffer is, which lowering relies on
    start = torch.zeros_like(write_index)
    if received is not None:  # nothing leaves but at intervals: entries lie in order, from 0 on
        scores = after_some(received, past_slots, tap, sums=sums)
        found["received"] = store(received, scores, start)
    if query is not None and ring_slots is not None:
        queries = torch.cat([query, tap.query.to(query.dtype)], dim=2)
        found["query"] = store(query, queries.index_select(2, ring_slots), start)
    return found
