"""The inputs of the language model's graphs: names, types and dimensions, in the graphs' order."""

from __future__ import annotations

import torch

from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.ports import GraphPort
from lvlm.export.recipes.parts.cache_rule import CacheRule
from lvlm.export.recipes.recipe import Recipe


def buffer_names(layers: int, *which: str) -> list[str]:
    """key_l, value_l and, with a ring of queries, query_l of every layer, in the graphs' order."""
    return [f"{name}_{layer}" for layer in range(layers) for name in which]


def buffer_kinds(rule: CacheRule | None) -> tuple[str, ...]:
    return ("key", "value", "query") if rule is not None and rule.queries else ("key", "value")


def buffer_inputs(
    model: LanguageModel, rule: CacheRule | None, dtype: torch.dtype
) -> list[GraphPort]:
    """past_key_l and past_value_l [B,Hkv,C_l,d] of every layer, whose capacity is a dynamic
    dimension per layer, and the ring past_query_l [B,Hq,queries,d]."""
    ring = ("batch", model.heads, rule.queries if rule else 0, model.head_dim)
    return [
        GraphPort(
            f"past_{kind}_{layer}",
            dtype,
            ring
            if kind == "query"
            else ("batch", model.kv_heads, f"capacity_{layer}", model.head_dim),
        )
        for layer in range(len(model.blocks))
        for kind in buffer_kinds(rule)
    ]


def recipe_inputs(model: LanguageModel, recipe: Recipe) -> list[GraphPort]:
    """What the recipe adds to the inputs of prefill: the merging's, then the cache rule's."""
    rule = recipe.cache_rule()
    return recipe.inputs() + (rule.inputs(len(model.blocks)) if rule else [])


def prefill_inputs(
    model: LanguageModel, recipe: Recipe, dtype: torch.dtype, cache: torch.dtype
) -> list[GraphPort]:
    """The inputs of Prefill in order: the fixed ones, the recipe's, the buffers (of ``cache``)."""
    row = ("batch", "sequence")
    fixed = [
        GraphPort("input_ids", torch.int64, row),
        GraphPort("image_features", dtype, ("rows", model.feature_width)),
        GraphPort("image_row", torch.int64, row),
        GraphPort("image_id", torch.int64, row),
        GraphPort("position_ids", torch.int64, row if model.position_rows == 1 else (3, *row)),
    ]
    buffers = buffer_inputs(model, recipe.cache_rule(), cache)
    return [*fixed, *recipe_inputs(model, recipe), *buffers]


def decode_inputs(
    model: LanguageModel, rule: CacheRule | None, dtype: torch.dtype
) -> list[GraphPort]:
    layers = len(model.blocks)
    fixed = [
        GraphPort("input_ids", torch.int64, ("batch", 1)),
        GraphPort("position_ids", torch.int64, ("batch", 1)),
        GraphPort("write_index", torch.int64, (layers, "batch")),
        GraphPort("valid_length", torch.int64, (layers, "batch")),
    ]
    if rule is not None and rule.queries:
        fixed.append(GraphPort("query_index", torch.int64, ("batch",)))
    return [*fixed, *buffer_inputs(model, rule, dtype)]


def compact_inputs(model: LanguageModel, rule: CacheRule, dtype: torch.dtype) -> list[GraphPort]:
    return [*compact_counts(rule, len(model.blocks)), *buffer_inputs(model, rule, dtype)]


def compact_counts(rule: CacheRule, layers: int) -> list[GraphPort]:
    return [
        GraphPort("valid_length", torch.int64, (layers, "batch")),
        GraphPort("query_slot", torch.int64, (layers, "batch", rule.queries)),
        *rule.inputs(layers),
    ]
