"""The graphs of a bundle as files, canonical and lowered, and their descriptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from lvlm.export.export_plan import ExportPlan
from lvlm.export.graphs.cache_entries import held_width
from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.targets.description import AT_THE_END, CACHE_WRITES, POSITIONS
from lvlm.export.targets.target import Target
from lvlm.export.weights.weights_file import WeightsFile
from lvlm.runtime.bundle.manifest import Capacity, Graph
from lvlm.runtime.kv.static_capacity import aligned_capacity


def write_graphs(
    plan: ExportPlan, graphs: Sequence[TracedGraph], weights: WeightsFile, folder: Path
) -> dict[str, Graph]:
    """Write the canonical graphs; their descriptions by name."""
    described = {}
    for graph in graphs:
        inputs, outputs = graph.ports()
        names = weights.names(graph)
        described[graph.name] = Graph(f"{graph.name}.onnx", inputs, outputs, names)
        if graph.name == "decode":
            graph.model.metadata_props.update(_facts(plan))
        ir.save(graph.model, folder / f"{graph.name}.onnx")
    return described


def lower(
    target: Target, plan: ExportPlan, graphs: dict[str, Graph], folder: Path
) -> dict[str, Graph]:
    """Write a target's graphs; the descriptions with what was written."""
    files = {name: graph.file for name, graph in graphs.items()}
    written = set(target.write(folder, files, _static_capacity(plan)))
    return {
        name: replace(graph, lowered={**graph.lowered, target.name: file})
        if (file := target.file(graph.file)) in written
        else graph
        for name, graph in graphs.items()
    }


def _static_capacity(plan: ExportPlan) -> Capacity:
    language, rule = plan.skeleton.language, plan.recipe.cache_rule()
    dtype = plan.cache_dtype
    entry = language.kv_heads * held_width(language.head_dim, dtype) * dtype.itemsize
    scored = rule is not None and rule.cache_policy.received
    return aligned_capacity(plan.cache.capacity, entry, scored=scored)


def _facts(plan: ExportPlan) -> dict[str, str]:
    """Facts that targets ask of a decode graph and its nodes do not say."""
    rule, capacity = plan.recipe.cache_rule(), plan.cache.capacity
    positions = capacity.max_text_len + capacity.max_images * plan.images.tokens
    appends = rule is None or not rule.cache_policy.decode.one_by_one
    return {POSITIONS: str(positions)} | ({CACHE_WRITES: AT_THE_END} if appends else {})
