"""Checkpoints and bundles that many tests share, each made once, whichever process comes first."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import drawn
import pytest
import torch
from bundles import FAMILIES, TINY
from filelock import FileLock
from random_weights import randomise
from settings import ASSETS

from lvlm.core.discovery import discover
from lvlm.core.progress import Progress
from lvlm.export import export_plan, exporter
from lvlm.export.checkpoint.model_shape import default_dtype
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import ExportPlan
from lvlm.export.graphs import tracing
from lvlm.export.graphs.graph import BundleGraph
from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.recipes.recipe import parse_settings
from lvlm.export.targets.target import Target

torch.set_num_threads(1)  # the environment may say otherwise


def make_checkpoint(name: str, shared: Path) -> Path:
    """The folder of a checkpoint: tiny-llava, or random weights for a named configuration."""
    if name == "tiny-llava":
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
            shutil.copy(ASSETS / "tiny-llava" / file, folder)
        for file, content in family.tiny_files(config).items():
            (folder / file).write_text(content)
        (folder / "complete").touch()
    return folder


TRACED: dict[Hashable, TracedGraph] = {}


def traced_once(plan: ExportPlan) -> Callable[..., TracedGraph]:
    """The exporter's ``trace``, but for graphs that this process has traced for another bundle.

    Vision is the same whatever the recipe, decode and compact are where the cache policy is,
    prefill where the recipe is. Tracing is most of what a small export takes. A copy differs from
    its original in the numbers of inner nodes' names alone.
    """

    def trace(graph: BundleGraph, *given: Any) -> TracedGraph:
        rules = [getattr(graph, name, None) for name in ("recipe", "rule")]
        of_graph = (graph.name, graph.inputs(), graph.outputs(), rules)
        key = (plan.options.model, plan.dtype, repr(of_graph))
        if key not in TRACED:
            TRACED[key] = tracing.trace(graph, *given)
        return copy_of(TRACED[key])

    return trace


def copy_of(graph: TracedGraph) -> TracedGraph:
    model = graph.model.clone()
    own = {name: model.graph.initializers[str(v.name)] for name, v in graph.parameters.items()}
    return replace(graph, model=model, parameters=own)


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
                patch.setattr(exporter, "trace", traced_once(plan))
                exporter.export(plan, Progress(0, quiet=True))
    return output
