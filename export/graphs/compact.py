"""The graph ``compact``: between two decode steps every layer's cache is made shorter."""

from __future__ import annotations

import torch
from torch import nn

from lvlm.export.graphs.blocks import store
from lvlm.export.graphs.graph import Tensors
from lvlm.export.graphs.language_graph import ENTRIES, LanguageGraph
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.graphs.repeats import like, repeated
from lvlm.export.ports import BATCH, GraphPort, LayerPort, one_layer
from lvlm.export.recipes.parts.cache_rule import CacheRule


class Compact(LanguageGraph):
    """Between two decode steps: every layer drops what its recent queries attend to least.

    valid_length [L,B] int64; query_slot [L,B,queries] int64: the slot of each ring query's own
    entry, -1 unused; the rule's inputs; then the buffers.
    -> kept [L,B] int64 (-1: an importance was not finite), the keys and values
    """

    name = "compact"

    def __init__(self, model: LanguageModel, rule: CacheRule, cache_dtype: torch.dtype) -> None:
        super().__init__(model, rule, cache_dtype)
        self.compacts = rule
        self.none = nn.Identity()  # no weights: all layers are alike

    def counts(self) -> list[LayerPort]:
        """What each layer takes besides its buffers."""
        return [
            LayerPort("valid_length", torch.int64, (BATCH,), stacked=True),
            LayerPort("query_slot", torch.int64, (BATCH, self.queries), stacked=True),
            *self.compacts.inputs(),
        ]

    def inputs(self) -> list[GraphPort]:
        return [*self.in_all_layers(self.counts()), *self.buffer_ports("past", self.kinds)]

    def outputs(self) -> list[GraphPort]:
        return [
            *self.in_all_layers(self.compacts.outputs()),
            *self.buffer_ports("present", ENTRIES),
        ]

    def compute(self, given: Tensors) -> dict[str, torch.Tensor]:
        start = torch.zeros_like(given["valid_length"][0])
        outputs: dict[str, torch.Tensor] = {}
        kept: list[torch.Tensor] = []
        for layer in range(len(self.model.blocks)):
            own = self.past(layer, given)
            taken = {"start": start, **own, **one_layer(self.counts(), layer, given)}
            described = {"kept": like(start)} | {kind: like(own[kind]) for kind in ENTRIES}
            written = repeated(self._layer, self.none, taken, described)
            kept.append(written.pop("kept"))
            outputs |= self.present(layer, written)
        outputs["kept"] = torch.stack(kept)
        return outputs

    def _layer(
        self,
        _: nn.Module,
        start: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query: torch.Tensor,
        **counts: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """How many entries of a layer stay, and its keys and values with these first."""
        dtype = next(self.model.norm.parameters()).dtype  # that of what is computed
        keys, values, queries = (buffer.to(dtype) for buffer in (key, value, query))
        *new, count = self.compacts.compact_buffers(queries, keys, values, self.model.scale, counts)
        stored = (store(old, x, start) for old, x in zip((key, value), new, strict=True))
        return {"kept": count} | dict(zip(ENTRIES, stored, strict=True))
