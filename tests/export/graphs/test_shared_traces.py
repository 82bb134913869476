"""Graphs for which tests make one trace (tests/exports.py) are alike when each is traced."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
from exports import trace_key

from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.graphs.bundle_graphs import bundle_graphs
from lvlm.export.graphs.tracing import trace
from lvlm.export.leaves import leaves_of
from lvlm.export.recipes.recipe import known_recipe, parse_settings

RECIPES = (("snapkv", "window=8"), ("pyramidkv", "kv_keep=0.2"), ("streaming-llm", "kv_sinks=0"))


def described(model: ir.Model) -> list[str]:
    """Nodes in their order, with their attributes, but for the names of values."""
    nodes = [*model.graph, *(node for function in model.functions.values() for node in function)]
    lines = [
        f"{n.domain}:{n.op_type} {len(n.inputs)} {sorted(map(str, n.attributes.values()))}"
        for n in nodes
    ]
    return [re.sub(r"anonymous_node:\d+", "", line) for line in lines]


def test_windows_that_hide_nothing_make_other_graphs(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    keys: list[set[str]] = []
    for text in (8, 2048):
        options = ExportOptions(
            str(checkpoint("gemma3:mha-bias-global-first")),
            parse_settings(known_recipe("none"), ()),
            tmp_path,
            dtype="fp32",
            max_images=1,
            max_text_len=text,
        )
        plan = make_plan(options)
        arrays = plan.family.vision_inputs(plan.images)
        graphs = bundle_graphs(plan.skeleton, plan.recipe, arrays, plan.cache_dtype)
        keys.append({trace_key(plan, graph) for graph in graphs if graph.name != "vision"})
    assert not keys[0] & keys[1]


def test_they_are_alike(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Two policies that differ in budgets alone, and decode whatever the policy."""
    found: dict[str, list[list[str]]] = {}
    for name, *settings in RECIPES:
        recipe = parse_settings(known_recipe(name), settings)
        folder = str(checkpoint("llava:llama-gqa-clip"))
        plan = make_plan(ExportOptions(folder, recipe, tmp_path / name, dtype="fp32"))
        skeleton, arrays = plan.skeleton, plan.family.vision_inputs(plan.images)
        for graph in bundle_graphs(skeleton, plan.recipe, arrays, plan.cache_dtype):
            if graph.name == "vision" or (graph.name, name) == ("decode", "pyramidkv"):
                continue
            with leaves_of(plan.family).exchanged(skeleton.model):
                traced = trace(graph, skeleton.model, skeleton.mode)
            found.setdefault(trace_key(plan, graph), []).append(described(traced.model))
    assert sorted(len(traces) for traces in found.values()) == [1, 2, 2]
    for first, *others in found.values():
        for other in others:
            assert other == first
