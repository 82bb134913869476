"""The graph ``compact``: between two decode steps every layer's cache is made shorter."""

from __future__ import annotations

import torch
from torch import nn

from lvlm.export.graphs.cache_entries import as_computed, store
from lvlm.export.graphs.graph import Tensors
from lvlm.export.graphs.language_graph import LanguageGraph
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.graphs.repeats import like, repeated
from lvlm.export.ports import BATCH, GraphPort, LayerPort, one_layer
from lvlm.export.recipes.parts.cache_rule import CacheRule


class Compact(LanguageGraph):
    """Between two decode steps: every layer drops what its recent queries, or all so far, attend to
    least.

    valid_length [L,B] int64; with a ring of queries query_slot [L,B,queries] int64: the slot of
    each ring query's own entry, -1 unused; the rule's inputs; then the buffers.
    -> kept [L,B] int64 (-1: an importance was not finite), the buffers of entries
    """

    name = "compact"

    def __init__(self, model: LanguageModel, rule: CacheRule, cache_dtype: torch.dtype) -> None:
        super().__init__(model, rule, cache_dtype)
        self.compacts = rule
        self.written = tuple(kind for kind in self.kinds if kind != "query")
        self.none = nn.Identity()  # no weights: all layers are alike

    def counts(self) -> list[LayerPort]:
        """Inputs of each layer besides its buffers."""
        ring = LayerPort("query_slot", torch.int64, (BATCH, self.queries), stacked=True)
        return [
            LayerPort("valid_length", torch.int64, (BATCH,), stacked=True),
            *([ring] if self.queries else []),
            *self.compacts.inputs(),
        ]

    def inputs(self) -> list[GraphPort]:
        return [*self.in_all_layers(self.counts()), *self.buffer_ports("past", self.kinds)]

    def outputs(self) -> list[GraphPort]:
        return [
            *self.in_all_layers(self.compacts.outputs()),
            *self.buffer_ports("present", self.written),
        ]

    def compute(self, given: Tensors) -> dict[str, torch.Tensor]:
        start = torch.zeros_like(given["valid_length"][0])
        outputs: dict[str, torch.Tensor] = {}
        kept: list[torch.Tensor] = []
        for layer in range(len(self.model.attending)):
            own = self.past(layer, given)
            taken = {"start": start, **own, **one_layer(self.counts(), layer, given)}
            described = {"kept": like(start)} | {kind: like(own[kind]) for kind in self.written}
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
        query: torch.Tensor | None = None,
        received: torch.Tensor | None = None,
        **counts: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The number of a layer's entries that stay, and its buffers with these first."""
        dtype = next(self.model.norm.parameters()).dtype  # that of what is computed
        queries = None if query is None else query.to(dtype)
        stay = self.compacts.compact_buffers(
            as_computed(key, dtype),
            as_computed(value, dtype),
            queries,
            received,
            self.model.logits,
            counts,
        )
        written = {
            "kept": stay.kept,
            "key": store(key, stay.key, start),
            "value": store(value, stay.value, start),
        }
        if received is not None and stay.received is not None:
            written["received"] = store(received, stay.received, start)
        return written
