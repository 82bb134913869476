"""The graphs of a bundle, traced from a family's parts and a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lvlm.export.graphs.language import Compact, Decode, Prefill
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.graphs.ports import (
    buffer_kinds,
    buffer_names,
    compact_inputs,
    decode_inputs,
    prefill_inputs,
    recipe_inputs,
)
from lvlm.export.graphs.tracing import TracedGraph, trace
from lvlm.export.ports import GraphPort
from lvlm.export.recipes.recipe import Recipe


def graph_names(recipe: Recipe) -> tuple[str, ...]:
    """The graphs of a bundle with this recipe."""
    rule = recipe.cache_rule()
    compact = ("compact",) if rule is not None and rule.queries else ()
    return ("vision", "prefill", "decode", *compact)


def parameter_names(model: nn.Module) -> dict[int, str]:
    """id(parameter) -> its (first) name in the checkpoint."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    return names


def trace_graph(
    name: str,
    model: nn.Module,
    vision: nn.Module,
    language: LanguageModel,
    recipe: Recipe,
    vision_inputs: Sequence[GraphPort],
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    mode: FakeTensorMode,
) -> TracedGraph:
    """One of ``graph_names``, without weights; image features are of ``dtype``, like these."""
    rule = recipe.cache_rule()
    layers = len(language.blocks)

    def present(*kinds: str) -> list[str]:
        return [f"present_{n}" for n in buffer_names(layers, *kinds)]

    build: Callable[[list[Any]], tuple[Any, ...]] = tuple
    if name == "vision":
        module: nn.Module = vision
        ports = list(vision_inputs)
        outputs = ["image_features"]
    elif name == "prefill":
        module = Prefill(language, recipe)
        ports = prefill_inputs(language, recipe, dtype, cache_dtype)
        maps = [f"merge_map_{i}" for i in range(len(recipe.reductions()))]
        outputs = ["logits", *maps, *(["kept"] if rule else []), *present(*buffer_kinds(rule))]
        extra = 5 + len(recipe_inputs(language, recipe))

        def build(x: list[Any]) -> tuple[Any, ...]:
            return (*x[:5], x[5:extra], x[extra:])
    elif name == "decode":
        module = Decode(language)
        ports = decode_inputs(language, rule, cache_dtype)
        outputs = ["logits", *present(*buffer_kinds(rule))]

        def build(x: list[Any]) -> tuple[Any, ...]:
            return (*x[:5], x[5:]) if rule is not None and rule.queries else (*x[:4], None, x[4:])
    else:
        assert name == "compact"
        assert rule is not None
        module = Compact(language, rule)
        ports = compact_inputs(language, rule, cache_dtype)
        outputs = ["kept", *present("key", "value")]
        counts = 3 + layers

        def build(x: list[Any]) -> tuple[Any, ...]:
            return x[:counts], x[counts:]

    names: Mapping[int, str] = parameter_names(model)
    return trace(name, module, ports, outputs, build, names, mode)
