"""Check of memory and disk for an export on this machine."""

from __future__ import annotations

import shutil

from lvlm.core.errors import ExportError
from lvlm.core.progress import size
from lvlm.export.checkpoint.plain_copy import copied_bytes
from lvlm.export.estimates import ExportWork, check_memory
from lvlm.export.export_plan import ExportPlan
from lvlm.export.graphs.bundle_graphs import graph_names
from lvlm.export.weights.quantization import linear_weights


def disk(plan: ExportPlan) -> int:
    """Bytes that the export writes at most; quantized weights once more for every target that
    takes them in a form of its own."""
    forms = 1 + sum(plan.quantization is not None and bool(t.signed) for t in plan.options.targets)
    kept = forms * plan.weight_bytes + plan.angle_bytes + 50_000_000
    return kept + plain_bytes(plan) + calibrated_bytes(plan)


def plain_bytes(plan: ExportPlan) -> int:
    """Bytes of the copy that the bundle is compared, a profile measured and weights rounded with; 0
    where the checkpoint itself does."""
    if not (plan.options.validate or plan.runs_first):
        return 0
    return copied_bytes(plan.checkpoint, plan.dtype)


def calibrated_bytes(plan: ExportPlan) -> int:
    """Bytes of the files that hold weights rounded on samples until the bundle does."""
    how = plan.options.quantization
    if how is None or plan.options.calibrate is None:
        return 0
    weights = linear_weights(plan.skeleton.model, plan.skeleton.language).values()
    return sum(w.numel() * how.bits // 8 + 4 * w.numel() // how.block for w in weights)


def seconds(plan: ExportPlan) -> float:
    """About how long the export takes, the download aside."""
    language = plan.skeleton.language
    unique = {id(p): p for p in plan.skeleton.model.parameters()}.values()
    return ExportWork(
        graphs=len(graph_names(plan.recipe, language, sessions=plan.options.sessions)),
        blocks=len(language.blocks),
        dense_bytes=sum(p.numel() for p in unique) * plan.dtype.itemsize,
        copied=plain_bytes(plan) > 0,
        quantized=plan.options.quantization is not None,
        calibrated=plan.options.calibrate is not None,
        runs=plan.options.validate + plan.measured,
    ).seconds


def check_machine(plan: ExportPlan) -> None:
    """ExportError, with what helps, where disk or memory are too small for the export."""
    output = plan.options.output.absolute()
    free = shutil.disk_usage(output.parent).free
    if free < disk(plan):
        copy = plain_bytes(plan)
        raise ExportError(
            f"the bundle needs {size(disk(plan))}, the disk has {size(free)} free; "
            "free some or give -o on another disk"
            + (f", or --no-validate ({size(copy)} less)" if copy and not plan.runs_first else "")
        )
    check_memory(
        "the export",
        plan.peak_bytes,
        {f"give --no-validate (about {size(plan.unvalidated_bytes)})": plan.unvalidated_bytes},
    )
