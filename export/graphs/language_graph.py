"""Parts that the language model's graphs share, and the cache buffers of every layer.

They write keys and values straight into the buffers they are given, a pair per layer, each layer
with its own capacity, rounded where the buffers are of lower precision than the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn

from lvlm.export.graphs.blocks import run_stateful
from lvlm.export.graphs.cache_entries import dtype_beside, held_width, store
from lvlm.export.graphs.graph import BundleGraph, Tensors
from lvlm.export.graphs.language_model import LanguageLayer, LanguageModel
from lvlm.export.graphs.repeats import like, repeated
from lvlm.export.ports import BATCH, GraphPort, LayerPort, all_layers
from lvlm.export.recipes.parts.cache_rule import CacheRule

# Of a layer's buffers; query: the ring of recent queries; received: the attention that each entry
# got, of all queries so far or of the newest; state: of layers that have no others
Kind = Literal["key", "value", "query", "received", "state"]
CAPACITY = "capacity"  # slots of a layer's buffers, a dimension of its own
ENTRIES: tuple[Kind, ...] = ("key", "value")
Caches = Mapping[Kind, Sequence[torch.Tensor]]  # the buffers of every layer


class LanguageGraph(BundleGraph):
    """A graph that takes past_key_l and past_value_l [B,Hkv,C_l,d] (int8: d + 1) of every layer,
    whose capacity C_l is a dynamic dimension per layer, with a ring of queries past_query_l
    [B,Hq,queries,d], and with scores that go on past_received_l [B,1,C_l,1] fp32; l counts the
    layers that attend. Those that keep states, s of them, have past_state_0 [B,s,n,D], and
    past_state_1 where each has two. What it writes of them is present_KIND_l."""

    def __init__(
        self, model: LanguageModel, rule: CacheRule | None, cache_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model, self.rule, self.cache_dtype = model, rule, cache_dtype
        self.queries = rule.queries if rule is not None else 0
        self.kinds: tuple[Kind, ...] = kinds_of(rule)
        heads = max((state.heads for state in model.states), default=0)
        self.bodies = {
            first: partial(run_stateful, first=first, heads=heads) for first in (False, True)
        }

    def in_all_layers(self, ports: Sequence[LayerPort]) -> list[GraphPort]:
        """Ports that are declared for one layer, for every layer of the model that attends."""
        return all_layers(ports, len(self.model.attending))

    def buffer_ports(self, prefix: str, kinds: Sequence[Kind]) -> list[GraphPort]:
        """The ports of every layer's buffers, in the order that all graphs have them in."""
        forms = self.buffer_forms()
        return self.in_all_layers([LayerPort(f"{prefix}_{kind}", *forms[kind]) for kind in kinds])

    def state_ports(self, prefix: str) -> list[GraphPort]:
        """The ports of the layers' states, behind the buffers: one for those of all layers, since
        TensorRT-RTX 1.7 crashes on writes of several."""
        found = zip(self.model.states, self.model.state_sizes, strict=True)
        return [
            GraphPort(
                f"{prefix}_state_{number}",
                torch.float32 if state.exact else dtype_beside(self.cache_dtype),
                (BATCH, *sizes),
            )
            for number, (state, sizes) in enumerate(found)
        ]

    def buffer_forms(self) -> dict[Kind, tuple[torch.dtype, tuple[int | str, ...]]]:
        """Dtype and dimensions of one layer's buffers of each kind."""
        model, dtype = self.model, self.cache_dtype
        entries = (BATCH, model.kv_heads, CAPACITY, held_width(model.head_dim, dtype))
        return {
            "key": (dtype, entries),
            "value": (dtype, entries),
            "query": (dtype_beside(dtype), (BATCH, model.heads, self.queries, model.head_dim)),
            "received": (torch.float32, (BATCH, 1, CAPACITY, 1)),
        }

    def past(self, layer: int, given: Tensors) -> dict[str, torch.Tensor]:
        """A layer's buffers by their kind."""
        return {kind: given[f"past_{kind}_{layer}"] for kind in self.kinds}

    def present(self, layer: int, written: Tensors) -> dict[str, torch.Tensor]:
        """A layer's buffers, ``written`` by their kind, as outputs of the graph."""
        return {f"present_{kind}_{layer}": x for kind, x in written.items()}

    def caches(self, outputs: Tensors) -> dict[Kind, list[torch.Tensor]]:
        """The buffers of every layer in what the graph gives, all kinds, and the states."""
        layers = range(len(self.model.attending))
        found = {k: [outputs[f"present_{k}_{layer}"] for layer in layers] for k in self.kinds}
        states = range(len(self.model.states))
        return found | {"state": [outputs[f"present_state_{number}"] for number in states]}

    def stateful(
        self,
        number: int,
        one: LanguageLayer,
        hidden: torch.Tensor,
        given: Tensors,
        first: bool = False,
        **more: torch.Tensor,
    ) -> tuple[torch.Tensor, Tensors]:
        """The output [B,N,D] of the layer ``one``, of those that keep states the one of that
        number, and its states afterwards; the others are those of ``run_stateful``."""
        names = [f"state_{which}" for which, _ in enumerate(one.states)]
        states = {name: given[f"past_{name}"][:, number : number + 1] for name in names}
        taken = {"hidden": hidden, **more, **states}
        described = {name: like(taken[name]) for name in ("hidden", *names)}
        new = repeated(self.bodies[first], one.block, taken, described)
        return new.pop("hidden"), new

    def stored(
        self, given: Tensors, states: Sequence[Tensors], start: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The layers' states, written from slot ``start`` [B] on as every buffer is: 0."""
        return {
            f"present_{name}": store(
                given[f"past_{name}"], torch.cat([one[name] for one in states], 1), start
            )
            for name in (states[0] if states else ())
        }


def kinds_of(rule: CacheRule | None) -> tuple[Kind, ...]:
    """The buffers that a layer has under a cache rule."""
    if rule is not None and rule.received:
        return (*ENTRIES, "received")
    return (*ENTRIES, "query") if rule is not None and rule.queries else ENTRIES


def parts_of(model: LanguageModel) -> nn.ModuleList:
    """The parts as submodules, so that tracing sees their parameters by name; blocks are traced
    apart (repeats.py)."""
    return nn.ModuleList([model.embed, *model.rotaries, model.norm, model.head])


def logits_at(model: LanguageModel, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Logits [B,vocabulary] fp32 after the token ``index`` [B] of each row of ``hidden`` [B,N,D],
    the last block's output."""
    rows = index[:, None, None].expand(-1, 1, hidden.shape[-1])
    return logits_of(model, hidden.gather(1, rows)[:, 0])


def logits_of(model: LanguageModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [B,vocabulary] fp32 of the last block's output [B,D] for a token of each row."""
    logits: torch.Tensor = model.head(model.norm(hidden)).float()
    if model.head_softcap:
        logits = model.head_softcap * torch.tanh(logits / model.head_softcap)
    return logits


def past_inputs(caches: Caches) -> dict[str, torch.Tensor]:
    """The inputs of a graph that are the buffers of every layer."""
    return {
        f"past_{kind}_{layer}": buffer
        for kind, buffers in caches.items()
        for layer, buffer in enumerate(buffers)
    }
