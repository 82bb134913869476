"""The language model as graphs: prefill, decode and compact, run from the checkpoint's own blocks.

All write keys and values straight into the cache buffers they are given, one pair per layer, each
layer with its own capacity, rounded where the buffers are narrower than the weights. Prefill
compacts a layer's entries right after the layer, so the full cache of all layers never exists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.graphs.ports import buffer_kinds, compact_counts, recipe_inputs
from lvlm.export.graphs.repeats import Described, like, repeated
from lvlm.export.ports import GraphPort
from lvlm.export.recipes.parts.cache_rule import CacheRule
from lvlm.export.recipes.parts.sequence import TokenSequence
from lvlm.export.recipes.recipe import Recipe
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
    block: nn.Module,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    cache: PromptEntries | CacheWriter,
    tap: Tap,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """A block's output [B,N,D]; ``angles`` are cos and sin [B,N,d] of the positions."""
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
    """The parts as submodules, so that tracing sees their parameters by name; blocks are traced
    apart (repeats.py)."""
    return nn.ModuleList([model.embed, model.rotary, model.norm, model.head])


def _own_inputs(
    one: Sequence[GraphPort], layer: int, inputs: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """What one layer takes of ``inputs``: the row of those that all layers have, and those of its
    own name; ``one`` describes them for a model of a single layer."""
    return [
        inputs[i.name][layer] if i.dims[0] == 1 else inputs[i.name.removesuffix("0") + str(layer)]
        for i in one
    ]


def _named(one: Sequence[GraphPort], own: Sequence[torch.Tensor]) -> dict[str, Any]:
    """``_own_inputs`` as a rule reads them, as those of layer 0."""
    return {i.name: (x,) if i.dims[0] == 1 else x for i, x in zip(one, own, strict=True)}


class Prefill(nn.Module):
    """Prompt to first logits, writing every layer's cache from slot 0 on.

    input_ids       [B,N] int64, padded on the right
    image_features  [R,(1+deep)*D]: the images of all rows; one row of zeros if there is none
    image_row       [B,N] int64: the row of these that replaces a placeholder, -1 for text and
                    padding
    image_id        [B,N] int64: -1 padding, 0 text, m the m-th image of the row
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
        first, *deepstack = (
            torch.split(features, model.hidden, dim=-1) if model.deepstack_layers else [features]
        )
        hidden = torch.where(image, first, model.embed(input_ids))
        state = TokenSequence(hidden, position_ids, image_id)
        start = torch.zeros_like(input_ids[:, 0])
        written: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        tap: Tap | None = None
        turned: torch.Tensor | None = None  # positions that the angles are of
        angles: tuple[torch.Tensor, ...] = ()
        kinds = len(buffer_kinds(rule))
        for layer, block in enumerate(model.blocks):
            state = recipe.before_block(layer, state, tap, inputs)
            if state.positions is not turned:
                turned = state.positions
                angles = model.rotary(state.hidden, position_ids=turned)
            own = buffers[kinds * layer : kinds * (layer + 1)]
            limits = _own_inputs(rule.inputs(1), layer, inputs) if rule else []
            given = [state.hidden, state.positions, state.image_id, *angles, start, *own, *limits]
            tap, state.hidden, count, new = self._repeat(block, given, own)
            kept += count
            written += new
            if layer < model.deepstack_layers:  # no recipe merges before (plan.py)
                state.hidden = state.hidden + torch.where(image, deepstack[layer], 0)
        width = state.hidden.shape[-1]
        last = state.hidden.gather(1, state.last()[:, None, None].expand(-1, 1, width))[:, 0]
        logits = model.head(model.norm(last)).float()
        counts = [torch.stack(kept)] if kept else []
        return (logits, *state.maps, *counts, *written)

    def _repeat(
        self, block: nn.Module, given: Sequence[torch.Tensor], own: Sequence[torch.Tensor]
    ) -> tuple[Tap, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """A block's tap, its output, with a cache rule how many entries stay, its buffers."""
        model, rule = self.model, self.rule
        (batch, length, _), dtype = given[0].shape, given[0].dtype
        scored = rule is not None and rule.scores_all
        outputs: list[Described] = [
            (dtype, (batch, model.heads, length, model.head_dim)),
            (dtype, (batch, model.kv_heads, length, model.head_dim)),
            like(given[0]),
            *([(torch.float32, (batch, length))] if scored else []),
            *([(torch.int64, (batch,))] if rule is not None else []),
            *map(like, own),
        ]
        query, key, hidden, *rest = repeated(self._block, block, given, outputs)
        tap = Tap(scale=model.scale)
        tap.query, tap.key = query, key
        if scored:
            tap.importance = rest.pop(0)
        return tap, hidden, [rest.pop(0)] if rule is not None else [], rest

    def _block(
        self,
        block: nn.Module,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        image_id: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        start: torch.Tensor,
        *rest: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """A block, and what its cache keeps of the prompt; the outputs as in ``_repeat``."""
        rule, kinds = self.rule, len(buffer_kinds(self.rule))
        buffers, counts = rest[:kinds], rest[kinds:]
        state = TokenSequence(hidden, positions, image_id)
        scored = rule is not None and rule.scores_all
        tap, entries = Tap(state.length() if scored else None), PromptEntries()
        state.hidden = run_block(block, hidden, positions, (cos, sin), entries, tap)
        new, kept = [entries.key, entries.value], []
        if rule is not None:
            own = _named(rule.inputs(1), counts)
            *new, count = rule.compact_prompt(0, state, tap, entries.key, entries.value, own)
            kept.append(count)
            if rule.queries:
                new.append(rule.ring(state, tap))
        received = [tap.importance] if scored else []
        written = [store(buffer, x, start) for buffer, x in zip(buffers, new, strict=True)]
        return (tap.query, tap.key, state.hidden, *received, *kept, *written)


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
        angles = model.rotary(hidden, position_ids=position_ids)
        ring = [] if query_index is None else [query_index]
        kinds = 2 + len(ring)
        written: list[torch.Tensor] = []
        for layer, block in enumerate(model.blocks):
            own = buffers[kinds * layer : kinds * (layer + 1)]
            given = [hidden, position_ids, *angles, *own]
            given += [write_index[layer], valid_length[layer], *ring]
            outputs = [like(hidden), *map(like, own)]
            hidden, *new = repeated(_decode_block, block, given, outputs)
            written += new
        logits = model.head(model.norm(hidden[:, 0])).float()
        return (logits, *written)


def _decode_block(
    block: nn.Module,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *rest: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """A block on one token per row, and its buffers with the token's entry."""
    key, value, *query, index, valid = rest if len(rest) == 4 else rest[:-1]
    slots = torch.arange(key.shape[2], device=hidden.device)
    mask = (slots[None] < valid[:, None])[:, None, None]
    cache, tap = CacheWriter((key, value), index), Tap()
    hidden = run_block(block, hidden, positions, (cos, sin), cache, tap, mask)
    return (hidden, *cache.written, *(store(ring, tap.query, rest[-1]) for ring in query))


class Compact(nn.Module):
    """Between two decode steps: every layer drops what its recent queries attend to least.

    valid_length, kv_budget [L,B] int64; query_slot [L,B,queries] int64: the slot of each ring
    query's own entry, -1 unused; kv_slots_l [K_l]; then the buffers (ports.buffer_inputs).
    -> kept [L,B] int64 (-1: an importance was not finite), the keys and values
    """

    def __init__(self, model: LanguageModel, rule: CacheRule) -> None:
        super().__init__()
        self.model, self.rule = model, rule
        self.none = nn.Identity()  # no weights: all layers are alike

    def forward(
        self, fixed: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        layers = len(self.model.blocks)
        names = (i.name for i in compact_counts(self.rule, layers))
        inputs = dict(zip(names, fixed, strict=True))
        start = torch.zeros_like(inputs["valid_length"][0])
        written: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        for layer in range(layers):
            own = buffers[3 * layer : 3 * layer + 3]
            counts = _own_inputs(compact_counts(self.rule, 1), layer, inputs)
            outputs = [like(start), *map(like, own[:2])]
            count, *new = repeated(self._layer, self.none, [start, *own, *counts], outputs)
            kept.append(count)
            written += new
        return (torch.stack(kept), *written)

    def _layer(
        self, _: nn.Module, start: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """How many entries of a layer stay, and its keys and values with these first."""
        own, counts = rest[:3], rest[3:]
        dtype = next(self.model.norm.parameters()).dtype  # that of what is computed
        key, value, queries = (buffer.to(dtype) for buffer in own)
        inputs = _named(compact_counts(self.rule, 1), counts)
        *new, count = self.rule.compact_buffers(0, queries, key, value, self.model.scale, inputs)
        written = (store(old, x, start) for old, x in zip(own, new, strict=False))
        return (count, *written)
