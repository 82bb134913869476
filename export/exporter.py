"""From a checkpoint and a recipe to a bundle: trace, stream the weights, check, rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from lvlm.core.errors import ExportError, ValidationError
from lvlm.core.integrity import File, describe
from lvlm.core.output import temporary_sibling
from lvlm.core.progress import Progress, size
from lvlm.export.checkpoint import checkpoint as checkpoints
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import ExportPlan
from lvlm.export.graphs.bundle_graphs import graph_names, trace_graph
from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.leaves import leaves_of
from lvlm.export.machine import check_machine
from lvlm.export.places import check_output
from lvlm.export.self_calibration import with_profile
from lvlm.export.targets.description import AT_THE_END, CACHE_WRITES, POSITIONS
from lvlm.export.targets.ort_cpu import TARGET as ORT_CPU
from lvlm.export.targets.target import Target
from lvlm.export.weights import store as weights
from lvlm.export.weights.fused_linears import fuse_linears
from lvlm.export.weights.quantization import linear_weights
from lvlm.export.weights.quantized_linears import BLOCKS, QuantizedTensor, quantize_linears
from lvlm.runtime.bundle.manifest import (
    SCHEMA,
    Graph,
    Manifest,
    Quantization,
    Text,
)
from lvlm.runtime.policies.evictions import OneByOne

TOOLS = ("lvlm-deploy", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime")


@dataclass
class Report:
    """What an export did."""

    output: Path
    plan: ExportPlan
    manifest: Manifest
    seconds: float
    validation: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def export(plan: ExportPlan, progress: Progress) -> Report:
    """Write the bundle; nothing is left in its place if any step fails."""
    output = plan.options.output
    check_output(output)
    check_machine(plan)
    with temporary_sibling(output, ExportError) as folder:
        plan = with_profile(plan, progress)
        manifest = write_bundle(plan, folder, progress)
        report = Report(output, plan, manifest, progress.elapsed)
        if plan.options.validate:
            from lvlm.export.verify.validation import validate

            with progress.stage("compare with the checkpoint on an image") as stage:
                try:
                    outcome = validate(plan, folder, stage.show)
                except ValidationError as error:
                    told = ValidationError(f"{error}; nothing was written")
                    told.details = error.details
                    raise told from None
                report.validation, report.notes = outcome.checks, outcome.told()
                stage.result = f"{len(outcome.checks)} checks passed; {outcome.estimate}"
            manifest = _record_validation(folder, manifest, asdict(outcome))
        os.replace(folder, output)
    return replace(report, manifest=manifest, seconds=progress.elapsed)


def stages(options: ExportOptions) -> int:
    """How many steps the progress of an export has."""
    wanted = options.recipe.calibration()
    measured = wanted is not None and wanted.file is None
    graphs = len(graph_names(options.recipe))
    return graphs + 2 + len(options.targets) + options.validate + measured


def write_bundle(plan: ExportPlan, folder: Path, progress: Progress) -> Manifest:
    """Everything of a bundle into an existing folder, unchecked."""
    graphs = _trace_all(plan, progress)
    transposed = weights.fold_transposes(graphs)
    fused = fuse_linears(graphs)
    quantized = _quantize(plan, graphs, fused)
    entries = weights.plan(graphs, transposed, fused, quantized)
    weights.attach(graphs, entries)
    listed = weights.table(entries)
    files: dict[str, File] = {}
    total = sum(e.nbytes for e in entries)
    with progress.stage("copy weights") as stage:
        files[weights.WEIGHTS] = weights.write(
            folder / weights.WEIGHTS,
            entries,
            plan.checkpoint,
            plan.stored_names,
            plan.dtype,
            lambda n: stage.add_bytes(n, total),
        )
        stage.result = size(total)
    with progress.stage("write graphs, tokenizer and manifest") as stage:
        described = {}
        for graph in graphs:
            inputs, outputs = graph.ports()
            names = [n for p in graph.parameters for n in (p, p + BLOCKS) if n in listed]
            described[graph.name] = Graph(f"{graph.name}.onnx", inputs, outputs, tuple(names))
            if graph.name == "decode":
                graph.model.metadata_props.update(_facts(plan))
            ir.save(graph.model, folder / f"{graph.name}.onnx")
        if (
            _name(plan.dtype) in ORT_CPU.matmul_types
        ):  # the default device's, in every bundle for it
            described = _lower(ORT_CPU, folder, described, plan)
        prompt = plan.prompt
        (folder / "tokenizer.json").write_text(prompt.tokenizer, encoding="utf-8")
        for name in prompt.files:
            shutil.copyfile(plan.checkpoint.folder / name, folder / name)
        if plan.profile is not None:
            plan.profile.write(folder / "profile.json")
        stage.result = f"{len(graphs)} graphs"
    for target in plan.options.targets:
        with progress.stage(f"lower for {target.name}") as stage:
            described = _lower(target, folder, described, plan)
            stage.result = f"*.{target.name}.onnx"
    language = plan.skeleton.language
    rule, how = plan.recipe.cache_rule(), plan.options.quantization
    manifest = Manifest(
        schema=SCHEMA,
        family=plan.family.name,
        model={
            "source": Path(plan.checkpoint.source).name
            if Path(plan.checkpoint.source).is_dir()
            else plan.checkpoint.source,
            "revision": plan.checkpoint.revision,
            "architecture": checkpoints.describe(plan.checkpoint.config),
        },
        recipe=plan.recipe.name,
        parameters=plan.recipe.parameters(),
        dtype=_name(plan.dtype),
        cache_dtype=_name(plan.cache_dtype),
        quantization=None if how is None else Quantization(how.bits, how.block),
        graphs=described,
        weights=listed,
        text=Text(
            layers=len(language.blocks),
            heads=language.heads,
            kv_heads=language.kv_heads,
            head_dim=language.head_dim,
            hidden=language.hidden,
            vocab=language.vocab,
            eos_ids=prompt.eos_ids,
        ),
        images=plan.images,
        keep=float(plan.recipe.parameters().get("keep", 1.0)),
        reductions=plan.recipe.reductions(),
        cache_policy=rule.cache_policy if rule else None,
        capacity=plan.cache.capacity,
        chat_template=prompt.chat_template,
        special_tokens=prompt.special_tokens,
        validation="skipped",
        tools={name: _version(name) for name in TOOLS},
        files=files | _hash_others(folder, files),
        generation=prompt.generation,
    )
    manifest.write(folder)
    return manifest


def _quantize(
    plan: ExportPlan, graphs: list[TracedGraph], fused: Mapping[str, tuple[str, ...]]
) -> dict[str, QuantizedTensor]:
    how = plan.options.quantization
    if how is None:
        return {}
    names = linear_weights(plan.skeleton.model, plan.skeleton.language)
    return quantize_linears(graphs, names, fused, how)


def _facts(plan: ExportPlan) -> dict[str, str]:
    """What targets ask of a decode graph that its nodes do not say."""
    rule, capacity = plan.recipe.cache_rule(), plan.cache.capacity
    positions = capacity.max_text_len + capacity.max_images * plan.images.tokens
    appends = rule is None or not isinstance(rule.cache_policy.decode, OneByOne)
    return {POSITIONS: str(positions)} | ({CACHE_WRITES: AT_THE_END} if appends else {})


def _lower(
    target: Target, folder: Path, graphs: dict[str, Graph], plan: ExportPlan
) -> dict[str, Graph]:
    """Write a target's graphs; the descriptions with what was written."""
    files = {name: graph.file for name, graph in graphs.items()}
    written = set(target.write(folder, files, plan.cache.capacity))
    return {
        name: replace(graph, lowered={**graph.lowered, target.name: file})
        if (file := target.file(graph.file)) in written
        else graph
        for name, graph in graphs.items()
    }


def _trace_all(plan: ExportPlan, progress: Progress) -> list[TracedGraph]:
    skeleton = plan.skeleton
    graphs = []
    leaves = leaves_of(plan.family)
    for name in graph_names(plan.recipe):
        with progress.stage(f"trace {name}") as stage, leaves.exchanged(skeleton.model):
            graph = trace_graph(
                name,
                skeleton.model,
                skeleton.vision,
                skeleton.language,
                plan.recipe,
                plan.family.vision_inputs(plan.images),
                plan.dtype,
                plan.cache_dtype,
                skeleton.mode,
            )
            stage.result = f"{len(graph.model.graph):,} nodes"
            graphs.append(graph)
    return graphs


def _hash_others(folder: Path, known: dict[str, File]) -> dict[str, File]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in known:
            found[name] = describe(path)
    return found


def _record_validation(folder: Path, manifest: Manifest, outcome: dict[str, Any]) -> Manifest:
    import json

    path = folder / "validation.json"
    path.write_text(json.dumps(outcome, indent=1, ensure_ascii=False) + "\n")
    file = describe(path)
    how = "passed, widened to fp32" if manifest.dtype == "bfloat16" else "passed"
    manifest = replace(manifest, validation=how, files={**manifest.files, path.name: file})
    manifest.write(folder)
    return manifest


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
