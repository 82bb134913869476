"""Summaries of a plan and of a finished bundle for ``lvlm-export``, as tables and as JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from lvlm.core.progress import duration, size
from lvlm.core.wrapping import wrapped
from lvlm.export.budgets.calibration_samples import samples_of, what_of
from lvlm.export.export_plan import ExportPlan
from lvlm.export.exporter import Report
from lvlm.export.graphs.bundle_graphs import graph_names
from lvlm.export.machine_check import disk, plain_bytes, seconds
from lvlm.export.targets.ort_cpu import TARGET as ORT_CPU
from lvlm.export.weights.gptq_rounding import METHOD
from lvlm.export.weights.quantization import linear_weights


def plan_data(plan: ExportPlan) -> dict[str, Any]:
    return {
        "model": plan.checkpoint.source,
        "form": plan.checkpoint.words,
        "family": plan.family.name,
        "recipe": {"name": plan.recipe.name, "parameters": plan.recipe.parameters()},
        "dtype": _name(plan.dtype),
        "weights": _weights(plan),
        "quantized_layers": _quantized_layers(plan),
        "calibration": _calibration(plan),
        "cache_dtype": _name(plan.cache_dtype),
        "output": str(plan.options.output),
        "graphs": [f"{name}.onnx" for name in _graphs(plan)],
        "files": bundle_files(plan),
        "download_bytes": plan.checkpoint.absent_bytes,
        "weight_bytes": plan.weight_bytes,
        "image_tokens": plan.images.tokens,
        "image_tokens_per_layer": plan.cache.image_tokens,
        "capacity": dataclasses.asdict(plan.cache.capacity),
        "cache_bytes_per_sequence": plan.cache.bytes,
        "peak_memory_estimate_bytes": plan.peak_bytes,
        "disk_bytes": disk(plan),
        "plain_copy_bytes": plain_bytes(plan),
        "seconds_estimate": round(seconds(plan)),
    }


def _graphs(plan: ExportPlan) -> tuple[str, ...]:
    return graph_names(plan.recipe, plan.skeleton.language, sessions=plan.options.sessions)


def bundle_files(plan: ExportPlan) -> list[str]:
    """Every file that the bundle will have."""
    graphs = _graphs(plan)
    files = ["lvlm.json", "weights.bin", "tokenizer.json", *plan.prompt.files]
    files += [f"{name}.onnx" for name in graphs]
    targets = list(plan.options.targets)
    if _name(plan.dtype) in ORT_CPU.matmul_types:
        targets.append(ORT_CPU)
    files += [target.file(f"{name}.onnx") for target in targets for name in target.lowers(graphs)]
    if plan.quantization is not None:
        files += [target.weights_file for target in plan.options.targets if target.signed]
    wanted = plan.recipe.calibration()
    if plan.profile is not None or (wanted is not None and wanted.file is None):
        files.append("profile.json")
    if plan.options.validate:
        files.append("validation.json")
    return sorted(set(files))


def plan_table(plan: ExportPlan) -> str:
    fetched = {"download": f"{size(plan.checkpoint.absent_bytes)} of weights, not done yet"}
    return layout(
        {
            "model": f"{plan.checkpoint.source} (family {plan.family.name})",
            "form": plan.checkpoint.words,
            **(fetched if plan.checkpoint.absent else {}),
            "recipe": _recipe_line(plan),
            "would write": f"{plan.options.output}/ with {', '.join(bundle_files(plan))}",
            "weights": f"{size(plan.weight_bytes)} as {_name(plan.dtype)}{_quantized(plan)}",
            "image tokens": _pyramid(plan),
            "cache": _cache(plan),
            "peak memory": f"about {size(plan.peak_bytes)} during export (estimate)",
            "disk": f"{size(disk(plan))} at most{_copy(plan)}",
            "time": f"about {duration(seconds(plan))} on two CPU cores (estimate)",
        }
    )


def report_table(report: Report) -> str:
    plan = report.plan
    total = sum(f.bytes for f in report.manifest.files.values())
    rows = {
        "bundle": f"{report.output}/  {size(total)} in {len(report.manifest.files)} files",
        "recipe": _recipe_line(plan),
        "image tokens": _pyramid(plan),
        "cache": _cache(plan),
        "took": f"{report.seconds:.1f} s",
        "validation": report.manifest.validation,
    }
    lines = [layout(rows)]
    if report.validation:
        from lvlm.export.verify.checks import table  # torch is loaded where something was checked

        lines.append(table(report.validation))
    lines += [wrapped("  note: ", note) for note in report.notes]
    lines.append(f'next: lvlm-run {report.output} --image IMAGE "QUESTION"')
    return "\n".join(lines)


def report_data(report: Report) -> dict[str, Any]:
    return plan_data(report.plan) | {
        "seconds": round(report.seconds, 2),
        "files": {name: f.bytes for name, f in report.manifest.files.items()},
        "validation": report.manifest.validation,
        "checks": [dataclasses.asdict(c) | {"passed": c.passed} for c in report.validation],
        "notes": report.notes,
    }


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _weights(plan: ExportPlan) -> dict[str, int] | None:
    how = plan.quantization
    return None if how is None else dataclasses.asdict(how)


def _quantized_layers(plan: ExportPlan) -> int:
    """The number of linear layers that are stored quantized."""
    if plan.options.quantization is None:
        return len(plan.packed)
    return len(linear_weights(plan.skeleton.model, plan.skeleton.language))


def _quantized(plan: ExportPlan) -> str:
    how, count = plan.options.quantization, _quantized_layers(plan)
    if how is not None:
        shared = "with a scale for each output" if how.whole else f"in blocks of {how.block}"
        return f", {count} linear layers quantized to int{how.bits} {shared}{_rounded_by(plan)}"
    if not plan.packed:
        return ", dequantized" if plan.options.dequantize else ""
    kinds = Counter((tensor.bits, tensor.block) for tensor in plan.packed.values())
    shown = (f"{n} as int{bits} in blocks of {block}" for (bits, block), n in kinds.items())
    return f", of the linear layers {', '.join(shown)}, as they come"


def _rounded_by(plan: ExportPlan) -> str:
    """The method that linear layers are rounded by, where not to the nearest numbers."""
    how = _calibration(plan)
    if how is None:
        return ""
    return f" by {METHOD.upper()} on {how['samples']} {what_of(plan.options.samples)}"


def _calibration(plan: ExportPlan) -> dict[str, Any] | None:
    options = plan.options
    if options.calibrate is None:
        return None
    if plan.calibrated is not None:  # the file may be gone by now
        return {**plan.calibrated.record, "file": options.samples}
    count = len(samples_of(options.samples))
    return {"method": METHOD, "file": options.samples, "samples": count}


def _copy(plan: ExportPlan) -> str:
    """Disk space that is needed for a while only."""
    copy = plain_bytes(plan)
    return f", {size(copy)} of it while a plain copy is compared with" if copy else ""


def _cache(plan: ExportPlan) -> str:
    dtype = _name(plan.cache_dtype)
    return f"{size(plan.cache.bytes)} per sequence at full capacity, as {dtype}"


def _recipe_line(plan: ExportPlan) -> str:
    values = ", ".join(f"{k}={v}" for k, v in plan.recipe.parameters().items() if v is not None)
    return f"{plan.recipe.name} ({values})" if values else plan.recipe.name


def _pyramid(plan: ExportPlan) -> str:
    counts, steps = plan.cache.image_tokens, [str(plan.images.tokens)]
    if plan.recipe.encoder_reduction() is not None:
        steps.append(f"{counts[0]} from the encoder on")
    for layer in range(1, len(counts)):
        if counts[layer] != counts[layer - 1]:
            steps.append(f"{counts[layer]} from block {layer}")
    mean = sum(counts) / len(counts) / plan.images.tokens
    return " → ".join(steps) + f" (mean over layers {mean:.0%})"


def layout(rows: dict[str, str]) -> str:
    """Names and values, in lines that fit a terminal of 80 columns where words allow it."""
    width = max(map(len, rows))
    return "\n".join(wrapped(f"  {name:{width}}  ", value) for name, value in rows.items())
