"""Checkpoints and bundles that many tests share, each made once, whichever process comes first."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import drawn
import onnx_ir as ir
import pytest
import torch
from bundles import FAMILIES, TINY
from filelock import FileLock
from random_weights import randomise
from settings import ASSETS, SHIPPED

from lvlm.core.discovery import discover
from lvlm.core.progress import Progress
from lvlm.export import export_plan, exporter
from lvlm.export.checkpoint.model_shape import default_dtype
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import ExportPlan
from lvlm.export.graphs import tracing
from lvlm.export.graphs.graph import BundleGraph
from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.recipes.parts.cache_rule import CacheRule
from lvlm.export.recipes.recipe import Recipe, parse_settings
from lvlm.export.targets.target import Target

torch.set_num_threads(1)  # the environment may say otherwise


def make_checkpoint(name: str, shared: Path) -> Path:
    """The folder of a checkpoint: tiny-llava, which is shipped, digits-llava, or random weights for
    a named configuration."""
    if name == "tiny-llava":
        return SHIPPED
    if name == "digits-llava":
        return ASSETS / name
    folder = shared / "checkpoints" / name.replace(":", "-")
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / "complete").exists():
            return folder
        if name.startswith(drawn.PREFIX):
            number = int(name.removeprefix(drawn.PREFIX))
            family, config, seed = FAMILIES["llava"], drawn.draw_config(number), number
        else:
            (family, config), seed = TINY[name], 1 + list(TINY).index(name)
        with default_dtype(torch.float32):
            model = family.build(config)
        randomise(model, seed)
        model.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(SHIPPED / file, folder)
        for file, content in family.tiny_files(config).items():
            (folder / file).write_text(content)
        (folder / "complete").touch()
    return folder


def traced_once(plan: ExportPlan, shared: Path) -> Callable[..., TracedGraph]:
    """The exporter's ``trace``, but for graphs that this run has traced for another bundle.

    Vision is the same whatever the recipe, decode and extend whatever the policy but for a ring of
    queries or scores that go on, prefill and compact where scores and selection are. Tracing is
    most of what a small export takes. A copy differs from its original in the numbers of inner
    nodes' names alone.
    """

    def trace(graph: BundleGraph, *given: Any) -> TracedGraph:
        file = shared / "traces" / f"{trace_key(plan, graph)}.onnx"
        file.parent.mkdir(exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.exists():
                traced = tracing.trace(graph, *given)
                write_trace(traced, file)
                return traced
        return read_trace(file, graph)

    return trace


def trace_key(plan: ExportPlan, graph: BundleGraph) -> str:
    """Of graphs with the same one a single trace is made; test_shared_traces.py makes both."""
    files = sorted(plan.checkpoint.folder.glob("*_config.json"))  # tokenizer's, processors' …
    config = json.dumps(dict(plan.checkpoint.config))  # as it is read: without quantization
    of_plan = (plan.dtype, config, [(file.name, file.read_text()) for file in files])
    rules = [_in_the_model(getattr(graph, "recipe", None))]
    rules.append(_in_the_graph(graph.name, getattr(graph, "rule", None)))
    # Windows that hide nothing of the longest prompt are left out
    layers = getattr(getattr(graph, "model", None), "layers", ())
    windows = [getattr(layer, "window", None) for layer in layers]
    of_graph = (graph.name, graph.inputs(), graph.outputs(), rules, windows)
    return hashlib.sha256(repr((of_plan, of_graph)).encode()).hexdigest()[:16]


def _in_the_model(recipe: Recipe | None) -> list[str]:
    """What of a recipe a graph is traced with: nothing of what happens at the encoder's output."""
    if recipe is None:
        return []
    reduction = recipe.token_reduction()
    named = repr(reduction) if is_dataclass(reduction) else type(reduction).__qualname__
    rule = _in_the_graph("prefill", recipe.cache_rule())
    return [named, type(recipe).before_block.__qualname__, *rule]


def _in_the_graph(name: str, rule: CacheRule | None) -> list[str]:
    """What of a cache policy a graph is traced with: counts are inputs."""
    if rule is None:
        return []
    ring = [str(rule.queries)] if rule.queries else []
    if name in ("decode", "extend"):
        return [*ring, f"sums {rule.sums}"] if rule.received else ring
    policy = rule.cache_policy
    kept = (policy.score, policy.select, policy.sinks, policy.recent)
    return [*ring, *map(repr, kept)]


def share_traces(patch: pytest.MonkeyPatch, shared: Path) -> None:
    """While ``patch`` lasts, exports of this process take the graphs that this run has traced."""
    own = exporter._trace_all

    def trace_all(plan: ExportPlan, progress: Progress) -> list[TracedGraph]:
        with pytest.MonkeyPatch.context() as within:
            within.setattr(exporter, "trace", traced_once(plan, shared))
            return own(plan, progress)

    patch.setattr(exporter, "_trace_all", trace_all)


def write_trace(graph: TracedGraph, file: Path) -> None:
    """As an ONNX file, for other exports and the other process: parameters, which have no values,
    are inputs there, behind the graph's own."""
    model = graph.model.clone()
    for parameter in graph.parameters.values():
        value = model.graph.initializers.pop(str(parameter.name))
        value.const_value = None
        model.graph.inputs.append(value)
    ir.save(model, file)


def read_trace(file: Path, graph: BundleGraph) -> TracedGraph:
    model, inputs, outputs = ir.load(file), graph.inputs(), graph.outputs()
    parameters = {str(value.name): value for value in model.graph.inputs[len(inputs) :]}
    del model.graph.inputs[len(inputs) :]
    for value in parameters.values():
        model.graph.initializers.add(value)
    return TracedGraph(graph.name, model, parameters, inputs, outputs)


def make_bundle(
    model: str,
    checkpoint: Path,
    shared: Path,
    recipe: str = "none",
    *settings: str,
    dtype: str = "fp32",
    targets: tuple[str, ...] = (),
    **options: Any,
) -> Path:
    """The folder of a bundle, without validation."""
    key = (model, recipe, settings, dtype, targets, *sorted(options.items()))
    output = shared / "bundles" / hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    output.parent.mkdir(exist_ok=True)
    with FileLock(f"{output}.lock"):
        if not output.exists():
            known: dict[str, Target] = discover("lvlm.export.targets", "TARGET")
            parsed = parse_settings(discover("lvlm.export.recipes", "RECIPE")[recipe], settings)
            plan = export_plan.make_plan(
                ExportOptions(
                    model=str(checkpoint),
                    recipe=parsed,
                    output=output,
                    dtype=dtype,
                    validate=False,
                    targets=tuple(known[t] for t in targets),
                    **options,
                )
            )
            with pytest.MonkeyPatch.context() as patch:
                share_traces(patch, shared)
                exporter.export(plan, Progress(0, quiet=True))
    return output
