"""Export of a checkpoint with a recipe: trace, stream the weights, check, rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lvlm.core.errors import ExportError, ValidationError
from lvlm.core.output import remove_abandoned, temporary_sibling
from lvlm.core.progress import Progress, size
from lvlm.export.bundle_manifest import dtype_name, record_validation, write_manifest
from lvlm.export.calibrated_weights import with_calibrated_weights
from lvlm.export.checkpoint.checkpoint import Checkpoint
from lvlm.export.checkpoint.plain_copy import write_plain
from lvlm.export.export_plan import ExportPlan
from lvlm.export.graph_files import lower, write_graphs
from lvlm.export.graphs.bundle_graphs import bundle_graphs, graph_names
from lvlm.export.graphs.tracing import TracedGraph, trace
from lvlm.export.leaves import leaves_of
from lvlm.export.machine_check import check_machine, plain_bytes
from lvlm.export.places import check_output
from lvlm.export.self_calibration import with_profile
from lvlm.export.targets.ort_cpu import TARGET as ORT_CPU
from lvlm.export.weights.quantization import linear_weights
from lvlm.export.weights.store import WeightStore
from lvlm.export.weights.weight_steps import weight_steps
from lvlm.export.weights.weights_file import WEIGHTS, WeightsFile
from lvlm.runtime.bundle.manifest import Manifest

PLAIN, CALIBRATED = "plain", "calibrated"  # kinds of folders beside the output


@dataclass
class Report:
    """Report of an export."""

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
    for beside in (_beside(plan, PLAIN), _beside(plan, CALIBRATED)):
        remove_abandoned(beside)
    with (
        temporary_sibling(output, ExportError) as folder,
        _plain(plan, progress) as plain,
        _calibrated(with_profile(plan, plain, progress), plain, progress) as plan,
    ):
        manifest = write_bundle(plan, folder, progress)
        report = Report(output, plan, manifest, progress.elapsed)
        if plan.options.validate:
            from lvlm.export.verify.validation import validate

            with progress.stage("compare with the checkpoint on an image") as stage:
                try:
                    checked = replace(plan, checkpoint=plain)
                    outcome = validate(checked, folder, stage.show)
                except ValidationError as error:
                    told = ValidationError(f"{error}; nothing was written")
                    told.details = error.details
                    raise told from None
                report.validation, report.notes = outcome.checks, outcome.told()
                stage.result = f"{len(outcome.checks)} checks passed; {outcome.estimate}"
            manifest = record_validation(folder, manifest, asdict(outcome))
        os.replace(folder, output)
    return replace(report, manifest=manifest, seconds=progress.elapsed)


def _beside(plan: ExportPlan, kind: str) -> Path:
    """A path beside the output, for what is needed for a while only."""
    return plan.options.output.with_name(f"{plan.options.output.name}-{kind}")


@contextmanager
def _plain(plan: ExportPlan, progress: Progress) -> Iterator[Checkpoint]:
    """The checkpoint as it is compared and measured with: itself, or a plain copy for that long."""
    if (total := plain_bytes(plan)) == 0:
        yield plan.checkpoint
        return
    with temporary_sibling(_beside(plan, PLAIN), ExportError) as folder:
        with progress.stage("write plain weights to compare with") as stage:
            copy = write_plain(
                plan.checkpoint, folder, plan.dtype, lambda n: stage.add_bytes(n, total)
            )
            stage.result = size(total)
        yield copy


@contextmanager
def _calibrated(plan: ExportPlan, plain: Checkpoint, progress: Progress) -> Iterator[ExportPlan]:
    """The plan, for so long with weights that were rounded on samples, where options say so."""
    if plan.options.calibrate is None:
        yield plan
        return
    with temporary_sibling(_beside(plan, CALIBRATED), ExportError) as folder:
        yield with_calibrated_weights(plan, plain, folder, progress)


def stages(plan: ExportPlan) -> int:
    """Number of steps of an export's progress."""
    options = plan.options
    graphs = len(graph_names(plan.recipe, plan.skeleton.language, sessions=options.sessions))
    copied = plain_bytes(plan) > 0
    before = plan.measured + (options.calibrate is not None) + copied
    return graphs + 2 + len(options.targets) + options.validate + before


def write_bundle(plan: ExportPlan, folder: Path, progress: Progress) -> Manifest:
    """Everything of a bundle into an existing folder, unchecked."""
    graphs = _trace_all(plan, progress)
    weights = _weights(plan, graphs)
    with progress.stage("copy weights") as stage:
        hashed = weights.write(
            folder, plan.checkpoint, lambda n: stage.add_bytes(n, weights.nbytes)
        )
        stage.result = size(weights.nbytes)
    with progress.stage("write graphs, tokenizer and manifest") as stage:
        described = write_graphs(plan, graphs, weights, folder)
        if dtype_name(plan.dtype) in ORT_CPU.matmul_types:  # the default device's, in every bundle
            described = lower(ORT_CPU, plan, described, folder)
        _write_side_files(plan, folder)
        stage.result = f"{len(graphs)} graphs"
    for target in plan.options.targets:
        with progress.stage(f"lower for {target.name}") as stage:
            described = lower(target, plan, described, folder)
            stage.result = f"*.{target.name}.onnx"
    return write_manifest(plan, described, weights.table(), folder, {WEIGHTS: hashed})


def _trace_all(plan: ExportPlan, progress: Progress) -> list[TracedGraph]:
    skeleton, arrays = plan.skeleton, plan.family.vision_inputs(plan.images)
    traced, leaves = [], leaves_of(plan.family)
    sessions = plan.options.sessions
    for graph in bundle_graphs(skeleton, plan.recipe, arrays, plan.cache_dtype, sessions=sessions):
        with progress.stage(f"trace {graph.name}") as stage, leaves.exchanged(skeleton.model):
            traced.append(trace(graph, skeleton.model, skeleton.mode))
            stage.result = f"{len(traced[-1].model.graph):,} nodes"
    return traced


def _weights(plan: ExportPlan, graphs: list[TracedGraph]) -> WeightsFile:
    """The weights as they will lie in the file; ``graphs`` change to read them so."""
    store = WeightStore.of(graphs, plan.checkpoint, plan.stored_names, plan.dtype)
    linears = linear_weights(plan.skeleton.model, plan.skeleton.language)
    tensors = [plan.stored_names[name] for name in linears]
    calibrated = None if plan.calibrated is None else plan.calibrated.tensors
    for step in weight_steps(plan.options.quantization, tensors, plan.packed, calibrated):
        step.apply(graphs, store)
    weights = WeightsFile.of(store)
    weights.attach(graphs)
    return weights


def _write_side_files(plan: ExportPlan, folder: Path) -> None:
    """Tokenizer and processor files, and the profile that was measured."""
    (folder / "tokenizer.json").write_text(plan.prompt.tokenizer, encoding="utf-8")
    for name in plan.prompt.files:
        shutil.copyfile(plan.checkpoint.folder / name, folder / name)
    if plan.profile is not None:
        plan.profile.write(folder / "profile.json")
