"""The output of ``lvlm-build engine``: targets, a plan, what was built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lvlm.core.discovery import discover
from lvlm.core.progress import size
from lvlm.core.wrapping import wrapped
from lvlm.export.targets.description import NEW_OPS
from lvlm.export.targets.target import Target

if TYPE_CHECKING:
    from lvlm.plugins_trt.engines.engine_plan import EnginePlan
    from lvlm.runtime.bundle.engine_sets import EngineSet, Range

PEOPLE = {
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}


def targets() -> str:
    """The names that ``--target`` takes, in lines that fit a terminal of 80 columns."""
    known: dict[str, Target] = discover("lvlm.export.targets", "TARGET")
    return "\n\n".join("\n".join(_block(known[name])) for name in sorted(known))


def _block(target: Target) -> list[str]:
    written = sorted(NEW_OPS - target.imports)
    types = {"float32", "float16", "bfloat16"} - target.attention
    if types:
        which = "" if len(types) == 3 else f" {', '.join(sorted(types))}"
        # Where ours are plugins, the rest is one of them
        written.insert(0, f"Attention{which}{' that is not causal' * target.plugins}")
    architectures = ", ".join(map(str, target.sms)) or "any"
    facts = {
        "engine": f"{PEOPLE[target.flavour]} {'.'.join(map(str, target.version))}",
        "for": f"{target.platform} (sm {architectures})",
        "opset": f"{target.opset}, {'plugins' if target.plugins else 'no plugins'}",
        "decomposed": ", ".join(written) or "nothing",
        "quantized": _quantized(target),
        "verified": target.verified or "no",
    }
    lines = [target.name]
    for name, value in facts.items():
        lines.append(wrapped(f"  {name:11}  ", value))
    return lines


def _quantized(target: Target) -> str:
    """The low-precision weights that a target takes."""
    if target.low_precision:
        return "int4 and int8 in blocks"
    taken = [] if target.signed is None else sorted(target.signed.blocks.items())
    forms = [
        f"int{bits} with one scale for each output"
        if None in blocks
        else f"int{bits} in blocks of {', '.join(map(str, blocks))}"
        for bits, blocks in taken
    ]
    return "; ".join(forms) or "nothing"


def plan(plan: EnginePlan) -> str:
    """The engines that would be built, and their lengths."""
    target = plan.request.target
    needs = plan.memory
    lines = [
        f"target     {target.name}: {PEOPLE[target.flavour]} {plan.version}, "
        f"{plan.gpu or ', '.join(f'sm_{sm}' for sm in plan.sms) or 'any GPU'}",
        f"would make {plan.folder}",
    ]
    if plan.blocked:
        lines[1] = f"elsewhere  {target.platform}; not here: {plan.blocked}"
    if plan.shared:
        lines.append(
            f"weights    {size(needs.shared)} of matrices are inputs, one copy for all engines"
        )
    held = ", ".join(f"{graph} {size(count)}" for graph, count in needs.inside.items() if count)
    lines += [
        f"engines    hold of weights: {held}; and code, some MB each",
        f"cache      {size(needs.prompt)} a prompt, {size(needs.cache)} for {needs.prompts}",
        f"workspace  about {size(needs.workspace)} at most (the builder says what it is)",
        f"in all     about {size(needs.total)} of the GPU's memory when they run",
    ]
    head = ("graph", "dimension", "from", "usual", "to")
    rows = [
        (name, dim, str(r.min), str(r.opt), str(r.max))
        for name, profile in plan.profiles.items()
        for dim, r in profile.items()
    ]
    return "\n".join([*lines, _table([head, *rows])])


def result(engines: EngineSet) -> str:
    """The folder and what lies in it."""
    rows = [("engine", "size", "computes in", "batch", "tokens")]
    for graph in engines.graphs.values():
        profile = graph.profile
        batch, tokens = profile.get("batch"), profile.get("sequence", profile.get("tokens"))
        room = "" if graph.activations is None else size(graph.activations)
        rows.append((graph.file, size(graph.bytes), room, _span(batch), _span(tokens)))
    lines = [str(engines.folder), _table(rows)]
    shared = {w.name: w.nbytes for g in engines.graphs.values() for w in g.weights}
    if shared:
        lines.append(f"and {size(sum(shared.values()))} of weights as inputs, once for all engines")
    return "\n".join(lines)


def _span(extent: Range | None) -> str:
    return "" if extent is None else f"{extent.min} to {extent.max}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
