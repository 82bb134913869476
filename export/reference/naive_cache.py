"""The cache of the torch reference: plain lists of entries, from which evicted ones are deleted.

Entries lie in their logical order and what is evicted is really gone. The runtime's CompactCache
never moves an entry for one that leaves; both must give the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lvlm.export.graphs.language import Compact, Decode
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.recipes.parts.cache_rule import CacheRule
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.policies.evictions import OneByOne


class NaiveCache:
    """One prompt's entries, key and value [1,Hkv,n,d] of every layer, and its decode steps.

    ``buffers`` are what Prefill wrote; ``seen`` [L] the tokens that entered each layer.
    """

    def __init__(
        self,
        model: LanguageModel,
        rule: CacheRule | None,
        budgets: Budgets,
        buffers: Sequence[torch.Tensor],
        seen: np.ndarray,
    ) -> None:
        self.model, self.rule, self.budgets = model, rule, budgets
        self.seen = seen.copy()
        kinds = 3 if rule is not None and rule.queries else 2
        self.keys, self.values = list(buffers[::kinds]), list(buffers[1::kinds])
        self.queries = list(buffers[2::kinds]) if kinds == 3 else []
        # How many of a layer's queries are real: a short prompt leaves the first ones empty.
        self.known = np.minimum(seen, rule.queries if rule else 0)
        self.steps = 0
        kept = np.array([key.shape[2] for key in self.keys])
        fixed = rule is not None and isinstance(rule.cache_policy.decode, OneByOne)
        self.fixed_point = budgets.fixed_point(kept[:, None])[:, 0] if fixed else None

    def entries(self) -> list[torch.Tensor]:
        """Key and value of every layer in turn."""
        return [x for pair in zip(self.keys, self.values, strict=True) for x in pair]

    def decode(self, token: int, position: np.ndarray) -> torch.Tensor:
        """Logits [1,vocabulary] after one more token at ``position`` [] int64, or [3]; evicts what
        the budgets say."""
        layers = len(self.keys)
        if self.rule is not None and self.rule.cache_policy.positions == "layer0":
            position = np.array(self.keys[0].shape[2])
        lengths = torch.tensor([[key.shape[2]] for key in self.keys])
        buffers: list[torch.Tensor] = []
        for layer in range(layers):
            for entries in (self.keys[layer], self.values[layer]):
                buffers.append(torch.cat((entries, torch.zeros_like(entries[:, :, :1])), dim=2))
            if self.queries:
                ring = self.queries[layer]
                buffers.append(torch.cat((ring[:, :, 1:], torch.zeros_like(ring[:, :, :1])), dim=2))
        newest = torch.tensor([self.rule.queries - 1]) if self.rule and self.queries else None
        logits, *buffers = Decode(self.model)(
            torch.tensor([[token]]),
            torch.from_numpy(position[..., None, None]),
            lengths,
            lengths + 1,
            newest,
            buffers,
        )
        kinds = 3 if self.queries else 2
        self.keys, self.values = buffers[::kinds], buffers[1::kinds]
        self.queries = buffers[2::kinds] if self.queries else []
        self.seen += 1
        self.steps += 1
        if self.fixed_point is not None:
            self._evict_one()
        elif self.rule is not None and self.rule.cache_policy.interval is not None:
            self.known = np.minimum(self.known + 1, self.rule.queries)
            if self.steps % self.rule.cache_policy.interval == 0:
                self._compact(buffers)
        assert isinstance(logits, torch.Tensor)
        return logits

    def _evict_one(self) -> None:
        assert self.fixed_point is not None
        budget = self.budgets.step(self.seen[:, None])[:, 0]
        for layer, point in enumerate(self.fixed_point):
            if self.keys[layer].shape[2] > budget[layer]:
                for entries in (self.keys, self.values):
                    parts = entries[layer][:, :, :point], entries[layer][:, :, point + 1 :]
                    entries[layer] = torch.cat(parts, dim=2)

    def _compact(self, buffers: Sequence[torch.Tensor]) -> None:
        assert self.rule is not None
        lengths = np.array([key.shape[2] for key in self.keys])
        budget = np.minimum(lengths, self.budgets.step(self.seen[:, None])[:, 0])
        back = np.arange(self.rule.queries - 1, -1, -1)
        slots = np.where(back < self.known[:, None], lengths[:, None] - 1 - back, -1)
        fixed = [lengths[:, None], slots[:, None], budget[:, None], *map(np.arange, budget)]
        _, *kept = Compact(self.model, self.rule)([torch.from_numpy(x) for x in fixed], buffers)
        for layer, count in enumerate(budget):
            self.keys[layer] = kept[2 * layer][:, :, :count]
            self.values[layer] = kept[2 * layer + 1][:, :, :count]
