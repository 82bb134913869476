"""The language model as two graphs, prefill and decode, run from the checkpoint's own blocks.

Both write keys and values straight into the cache buffers they are given, one pair per layer, each
layer with its own capacity: the cache of a reduced sequence is shorter from that block on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lvlm.export.recipes._base import GraphInput, Recipe, TokenSequence
from lvlm.export.standard_ops import Tap, scatter


@dataclass(frozen=True)
class LanguageModel:
    """The parts of a decoder-only language model, whatever their class."""

    embed: nn.Module
    rotary: nn.Module
    blocks: Sequence[nn.Module]
    norm: nn.Module
    head: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    window: int | None = None  # keys a query can see; the exported length must stay below


class CacheWriter:
    """Stands in for transformers' cache: writes one block's K/V [B,Hkv,n,d] into its buffers."""

    def __init__(
        self, buffers: Sequence[torch.Tensor], index: torch.Tensor, *, attend_cache: bool
    ) -> None:
        self.buffers, self.index, self.attend_cache = buffers, index, attend_cache
        self.written: list[torch.Tensor] = []

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new_key, new_value = (
            scatter(buffer, x, self.index)
            for buffer, x in zip(self.buffers, (key, value), strict=True)
        )
        self.written += [new_key, new_value]
        return (new_key, new_value) if self.attend_cache else (key, value)


def run_block(
    model: LanguageModel,
    block: nn.Module,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    cache: CacheWriter,
    *,
    mask: torch.Tensor | None = None,
    tap: Tap | None = None,
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
    image_features  [P,V,D]: the pictures of all rows; one of zeros if there is none
    image_row       [B,N] int64: row of the flattened features [P*V] that replaces a placeholder,
                    -1 for text and padding
    image_id        [B,N] int64: -1 padding, 0 text, m the m-th picture of the row
    position_ids    [B,N] int64
    and the recipe's inputs, and per layer past_key_l, past_value_l [B,Hkv,C_l,d].
    -> logits [B,vocabulary] fp32 after each row's last token, the reductions' maps, the caches
    """

    def __init__(self, model: LanguageModel, recipe: Recipe) -> None:
        super().__init__()
        self.parts = _registered(model)
        self.model, self.recipe = model, recipe

    def forward(
        self,
        input_ids: torch.Tensor,
        image_features: torch.Tensor,
        image_row: torch.Tensor,
        image_id: torch.Tensor,
        position_ids: torch.Tensor,
        extra: Sequence[torch.Tensor],
        caches: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        model = self.model
        inputs = dict(zip((i.name for i in self.recipe.inputs()), extra, strict=True))
        features = nn.functional.embedding(image_row.clamp(min=0), image_features.flatten(0, 1))
        hidden = torch.where((image_row >= 0)[..., None], features, model.embed(input_ids))
        state = TokenSequence(hidden, position_ids, image_id)
        start = torch.zeros_like(input_ids[:, 0])
        written: list[torch.Tensor] = []
        tap: Tap | None = None
        for layer, block in enumerate(model.blocks):
            state = self.recipe.before_block(layer, state, tap, inputs)
            tap = Tap() if self.recipe.taps(layer) else None
            pair = caches[2 * layer : 2 * layer + 2]
            cache = CacheWriter(pair, start, attend_cache=False)
            state.hidden = run_block(model, block, state.hidden, state.positions, cache, tap=tap)
            written += cache.written
        width = state.hidden.shape[-1]
        last = state.hidden.gather(1, state.last()[:, None, None].expand(-1, 1, width))[:, 0]
        logits = model.head(model.norm(last)).float()
        return (logits, *state.maps, *written)


class Decode(nn.Module):
    """One token per row to the next logits, writing one cache entry per layer in place.

    input_ids, position_ids [B,1] int64; write_index, valid_length [L,B] int64: the slot that takes
    the new entry and how many slots are valid with it; then past_key_l, past_value_l [B,Hkv,C_l,d].
    -> logits [B,vocabulary] fp32, the caches
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
        caches: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        model = self.model
        hidden = model.embed(input_ids)
        written: list[torch.Tensor] = []
        for layer, block in enumerate(model.blocks):
            pair = caches[2 * layer : 2 * layer + 2]
            slots = torch.arange(pair[0].shape[2], device=hidden.device)
            mask = (slots[None] < valid_length[layer][:, None])[:, None, None]
            cache = CacheWriter(pair, write_index[layer], attend_cache=True)
            hidden = run_block(model, block, hidden, position_ids, cache, mask=mask)
            written += cache.written
        logits = model.head(model.norm(hidden[:, 0])).float()
        return (logits, *written)


def cache_inputs(model: LanguageModel, dtype: torch.dtype) -> list[GraphInput]:
    """past_key_l and past_value_l of every layer; the capacity is a dynamic dimension per layer."""
    return [
        GraphInput(
            f"past_{which}_{layer}",
            dtype,
            ("batch", model.kv_heads, f"capacity_{layer}", model.head_dim),
        )
        for layer in range(len(model.blocks))
        for which in ("key", "value")
    ]


def prefill_inputs(
    model: LanguageModel, recipe: Recipe, image_tokens: int, dtype: torch.dtype
) -> list[GraphInput]:
    """The inputs of Prefill in order: the fixed ones, the recipe's, the caches."""
    row = ("batch", "sequence")
    fixed = [
        GraphInput("input_ids", torch.int64, row),
        GraphInput("image_features", dtype, ("images", image_tokens, model.hidden)),
        GraphInput("image_row", torch.int64, row),
        GraphInput("image_id", torch.int64, row),
        GraphInput("position_ids", torch.int64, row),
    ]
    return [*fixed, *recipe.inputs(), *cache_inputs(model, dtype)]


def decode_inputs(model: LanguageModel, dtype: torch.dtype) -> list[GraphInput]:
    layers = len(model.blocks)
    fixed = [
        GraphInput("input_ids", torch.int64, ("batch", 1)),
        GraphInput("position_ids", torch.int64, ("batch", 1)),
        GraphInput("write_index", torch.int64, (layers, "batch")),
        GraphInput("valid_length", torch.int64, (layers, "batch")),
    ]
    return [*fixed, *cache_inputs(model, dtype)]
