"""The graphs of a bundle, traced from a family's parts and a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lvlm.export.language import Decode, LanguageModel, Prefill, decode_inputs, prefill_inputs
from lvlm.export.recipes._base import GraphInput, Recipe
from lvlm.export.tracing import TracedGraph, trace
from lvlm.runtime.bundle import Images

GRAPHS = ("vision", "prefill", "decode")


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
    images: Images,
    dtype: torch.dtype,
    mode: FakeTensorMode,
) -> TracedGraph:
    """One of GRAPHS, without weights."""
    caches = [
        f"present_{which}_{layer}"
        for layer in range(len(language.blocks))
        for which in ("key", "value")
    ]
    maps = [f"merge_map_{i}" for i in range(len(recipe.reductions()))]
    extra = len(recipe.inputs())

    def build() -> tuple[
        nn.Module, list[GraphInput], list[str], Callable[[list[Any]], tuple[Any, ...]]
    ]:
        if name == "vision":
            pixels = GraphInput("pixel_values", torch.float32, ("images", 3, *images.size))
            return vision, [pixels], ["image_features"], tuple
        if name == "prefill":
            ports = prefill_inputs(language, recipe, images.tokens, dtype)
            return (
                Prefill(language, recipe),
                ports,
                ["logits", *maps, *caches],
                lambda x: (*x[:5], x[5 : 5 + extra], x[5 + extra :]),
            )
        ports = decode_inputs(language, dtype)
        return Decode(language), ports, ["logits", *caches], lambda x: (*x[:4], x[4:])

    module, ports, outputs, arrange = build()
    names: Mapping[int, str] = parameter_names(model)
    return trace(name, module, ports, outputs, arrange, names, mode)
