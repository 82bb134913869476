"""The language model as graphs: prefill, decode and compact, run from the checkpoint's own blocks.

All write keys and values straight into the cache buffers they are given, one pair per layer, each
layer with its own capacity, rounded where the buffers are narrower than the weights. Prefill
compacts a layer's entries right after the layer, so the full cache of all layers never exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.graphs.ports import compact_counts, recipe_inputs
from lvlm.export.recipes._base import Recipe
from lvlm.export.recipes._cache import CacheRule
from lvlm.export.recipes._sequence import TokenSequence
from lvlm.export.standard_ops import Tap, scatter


class PromptEntries:
    """Stands in for transformers' cache in prefill: holds what a block would cache."""

    key: torch.Tensor  # [B,Hkv,N,d]
    value: torch.Tensor

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.key, self.value = key, value
        return key, value


class CacheWriter:
    """Stands in for transformers' cache in decode: writes one block's entry [B,Hkv,1,d] into its
    buffers and gives these to attend over."""

    def __init__(self, buffers: Sequence[torch.Tensor], index: torch.Tensor) -> None:
        self.buffers, self.index = buffers, index
        self.written: list[torch.Tensor] = []

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.written = [
            store(buffer, x, self.index)
            for buffer, x in zip(self.buffers, (key, value), strict=True)
        ]
        new_key, new_value = (x.to(key.dtype) for x in self.written)
        return new_key, new_value


def store(buffer: torch.Tensor, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``x`` [B,H,n,d], in the buffer's dtype, into ``buffer`` [B,H,C,d] from slot ``index`` on."""
    return scatter(buffer, x.to(buffer.dtype), index)


def run_block(
    model: LanguageModel,
    block: nn.Module,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    cache: PromptEntries | CacheWriter,
    tap: Tap,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    angles = model.rotary(hidden, position_ids=positions)
    out = block(
        hidden,
        attention_mask=mask,
        position_ids=positions,
        position_embeddings=angles,
        past_key_values=cache,
        tap=tap,
    )
    assert isinstance(out, torch.Tensor)
    return out


def _registered(model: LanguageModel) -> nn.ModuleList:
    """The parts as submodules, so that tracing sees their parameters by name."""
    return nn.ModuleList([model.embed, model.rotary, *model.blocks, model.norm, model.head])


class Prefill(nn.Module):
    """Prompt to first logits, writing every layer's cache from slot 0 on.

    input_ids       [B,N] int64, padded on the right
    image_features  [R,(1+deep)*D]: the pictures of all rows; one row of zeros if there is none
    image_row       [B,N] int64: the row of these that replaces a placeholder, -1 for text and
                    padding
    image_id        [B,N] int64: -1 padding, 0 text, m the m-th picture of the row
    position_ids    [B,N] int64, or [3,B,N]
    and the recipe's inputs, and the buffers (ports.buffer_inputs).
    -> logits [B,vocabulary] fp32 after each row's last token, the reductions' maps, with a cache
    rule kept [L,B] int64 (-1: an importance was not finite), the buffers
    """

    def __init__(self, model: LanguageModel, recipe: Recipe) -> None:
        super().__init__()
        self.parts = _registered(model)
        self.model, self.recipe, self.rule = model, recipe, recipe.cache_rule()

    def forward(
        self,
        input_ids: torch.Tensor,
        image_features: torch.Tensor,
        image_row: torch.Tensor,
        image_id: torch.Tensor,
        position_ids: torch.Tensor,
        extra: Sequence[torch.Tensor],
        buffers: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        model, recipe, rule = self.model, self.recipe, self.rule
        names = (i.name for i in recipe_inputs(model, recipe))
        inputs = dict(zip(names, extra, strict=True))
        features = nn.functional.embedding(image_row.clamp(min=0), image_features)
        image = (image_row >= 0)[..., None]
        first, *deep = torch.split(features, model.hidden, dim=-1) if model.deep else [features]
        hidden = torch.where(image, first, model.embed(input_ids))
        state = TokenSequence(hidden, position_ids, image_id)
        start = torch.zeros_like(input_ids[:, 0])
        scored = rule is not None and rule.scores_all
        written: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        tap: Tap | None = None
        for layer, block in enumerate(model.blocks):
            state = recipe.before_block(layer, state, tap, inputs)
            tap = Tap(state.length() if scored else None)
            entries = PromptEntries()
            state.hidden = run_block(model, block, state.hidden, state.positions, entries, tap)
            if layer < model.deep:  # no recipe merges before (plan.py)
                state.hidden = state.hidden + torch.where(image, deep[layer], 0)
            new = [entries.key, entries.value]
            if rule is not None:
                *new, count = rule.compact_prompt(
                    layer, state, tap, entries.key, entries.value, inputs
                )
                kept.append(count)
                if rule.queries:
                    new.append(rule.ring(state, tap)[0])
            own = buffers[len(written) : len(written) + len(new)]
            written += [store(buffer, x, start) for buffer, x in zip(own, new, strict=True)]
        width = state.hidden.shape[-1]
        last = state.hidden.gather(1, state.last()[:, None, None].expand(-1, 1, width))[:, 0]
        logits = model.head(model.norm(last)).float()
        counts = [torch.stack(kept)] if kept else []
        return (logits, *state.maps, *counts, *written)


class Decode(nn.Module):
    """One token per row to the next logits, writing one cache entry per layer in place.

    input_ids, position_ids [B,1] int64; write_index, valid_length [L,B] int64: the slot that takes
    the new entry and how many slots are valid with it; with a ring of queries query_index [B]
    int64, the slot of the ring that takes the new query; then the buffers (ports.buffer_inputs).
    -> logits [B,vocabulary] fp32, the buffers
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.parts = _registered(model)
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        write_index: torch.Tensor,
        valid_length: torch.Tensor,
        query_index: torch.Tensor | None,
        buffers: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        model = self.model
        hidden = model.embed(input_ids)
        written: list[torch.Tensor] = []
        for layer, block in enumerate(model.blocks):
            key, value = buffers[len(written) : len(written) + 2]
            slots = torch.arange(key.shape[2], device=hidden.device)
            mask = (slots[None] < valid_length[layer][:, None])[:, None, None]
            cache, tap = CacheWriter((key, value), write_index[layer]), Tap()
            hidden = run_block(model, block, hidden, position_ids, cache, tap, mask)
            written += cache.written
            if query_index is not None:
                written.append(store(buffers[len(written)], tap.query, query_index))
        logits = model.head(model.norm(hidden[:, 0])).float()
        return (logits, *written)


class Compact(nn.Module):
    """Between two decode steps: every layer drops what its recent queries attend to least.

    valid_length, kv_budget [L,B] int64; query_slot [L,B,queries] int64: the slot of each ring
    query's own entry, -1 unused; kv_slots_l [K_l]; then the buffers (ports.buffer_inputs).
    -> kept [L,B] int64 (-1: an importance was not finite), the keys and values
    """

    def __init__(self, model: LanguageModel, rule: CacheRule) -> None:
        super().__init__()
        self.model, self.rule = model, rule

    def forward(
        self, fixed: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        names = (i.name for i in compact_counts(self.model, self.rule))
        inputs = dict(zip(names, fixed, strict=True))
        start = torch.zeros_like(inputs["valid_length"][0])
        dtype = next(self.model.norm.parameters()).dtype  # that of what is computed
        written: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        for layer in range(len(self.model.blocks)):
            own = buffers[3 * layer : 3 * layer + 3]
            key, value, queries = (buffer.to(dtype) for buffer in own)
            *new, count = self.rule.compact_buffers(
                layer, queries, key, value, self.model.scale, inputs
            )
            kept.append(count)
            written += [store(old, x, start) for old, x in zip(own, new, strict=False)]
        return (torch.stack(kept), *written)
