"""The cache of the torch reference: plain lists of entries, from which evicted ones are deleted.

Entries lie in their logical order and what is evicted is really gone. The runtime's CompactCache
never moves an entry for one that leaves; both must give the same tokens.
"""

from __future__ import annotations

import numpy as np
import torch

from lvlm.export.graphs.cache_entries import as_computed
from lvlm.export.graphs.compact import Compact
from lvlm.export.graphs.decode import Decode
from lvlm.export.graphs.language_graph import Caches, Kind, past_inputs
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.recipes.parts.cache_rule import CacheRule
from lvlm.runtime.kv.budgets import Budgets


class NaiveCache:
    """One prompt's entries, key and value [1,Hkv,n,d] of every layer, and its decode steps.

    ``caches`` are what Prefill wrote; ``seen`` [L] the tokens that entered each layer.
    """

    def __init__(
        self,
        model: LanguageModel,
        rule: CacheRule | None,
        budgets: Budgets,
        caches: Caches,
        seen: np.ndarray,
    ) -> None:
        self.model, self.rule, self.budgets = model, rule, budgets
        self.seen = seen.copy()
        self.caches: dict[Kind, list[torch.Tensor]] = {k: list(x) for k, x in caches.items()}
        self.graph = Decode(model, rule, caches["key"][0].dtype)
        # How many of a layer's queries are real: a short prompt leaves the first ones empty.
        self.known = np.minimum(seen, rule.queries if rule else 0)
        self.steps = 0
        kept = np.array([key.shape[2] for key in caches["key"]])
        fixed = rule is not None and rule.cache_policy.decode.one_by_one
        self.fixed_point = budgets.fixed_point(kept[:, None])[:, 0] if fixed else None

    def entries(self) -> list[torch.Tensor]:
        """Key and value of every layer in turn; in fp32 where they are held in 8 bits."""
        pairs = zip(self.caches["key"], self.caches["value"], strict=True)
        held = [x for pair in pairs for x in pair]
        return [as_computed(x, torch.float32) if x.dtype == torch.int8 else x for x in held]

    def decode(self, token: int, position: np.ndarray) -> torch.Tensor:
        """Logits [1,vocabulary] after one more token at ``position`` [] int64, or [3]; evicts what
        the budgets say."""
        if self.rule is not None and self.rule.cache_policy.positions == "layer0":
            position = np.array(self.caches["key"][0].shape[2])
        lengths = torch.tensor([[key.shape[2]] for key in self.caches["key"]])
        given = {
            "input_ids": torch.tensor([[token]]),
            "position_ids": torch.from_numpy(position[..., None, None]),
            "write_index": lengths,
            "valid_length": lengths + 1,
            "query_index": torch.tensor([self.graph.queries - 1]),
            **past_inputs({k: [_longer(k, x) for x in xs] for k, xs in self.caches.items()}),
        }
        outputs = self.graph(given)
        self.caches = self.graph.caches(outputs)
        self.seen += 1
        self.steps += 1
        if self.fixed_point is not None:
            self._evict_one()
        elif self.rule is not None and self.rule.cache_policy.interval is not None:
            self.known = np.minimum(self.known + 1, self.rule.queries)
            if self.steps % self.rule.cache_policy.interval == 0:
                self._compact()
        logits = outputs["logits"]
        assert isinstance(logits, torch.Tensor)
        return logits

    def _evict_one(self) -> None:
        assert self.fixed_point is not None
        budget = self.budgets.step(self.seen[:, None])[:, 0]
        for layer, point in enumerate(self.fixed_point):
            if self.caches["key"][layer].shape[2] > budget[layer]:
                for entries in (self.caches["key"], self.caches["value"]):
                    parts = entries[layer][:, :, :point], entries[layer][:, :, point + 1 :]
                    entries[layer] = torch.cat(parts, dim=2)

    def _compact(self) -> None:
        assert self.rule is not None
        lengths = np.array([key.shape[2] for key in self.caches["key"]])
        budget = np.minimum(lengths, self.budgets.step(self.seen[:, None])[:, 0])
        back = np.arange(self.rule.queries - 1, -1, -1)
        slots = np.where(back < self.known[:, None], lengths[:, None] - 1 - back, -1)
        ring = {"query_slot": slots[:, None]} if self.rule.queries else {}
        counts = {
            "valid_length": lengths[:, None],
            **ring,
            "kv_budget": budget[:, None],
            **{f"kv_slots_{layer}": np.arange(count) for layer, count in enumerate(budget)},
        }
        given = {name: torch.from_numpy(x) for name, x in counts.items()}
        graph = Compact(self.model, self.rule, self.graph.cache_dtype)
        outputs = graph(given | past_inputs(self.caches))
        for kind in graph.written:
            self.caches[kind] = [
                outputs[f"present_{kind}_{layer}"][:, :, :count]
                for layer, count in enumerate(budget)
            ]


def _longer(kind: Kind, buffer: torch.Tensor) -> torch.Tensor:
    """The cache with a slot of zeros at the end; the ring without its first query instead; a state
    as it is."""
    if kind == "state":
        return buffer
    before = buffer[:, :, 1:] if kind == "query" else buffer
    return torch.cat((before, torch.zeros_like(buffer[:, :, :1])), dim=2)
