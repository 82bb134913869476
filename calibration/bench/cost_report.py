"""Costs of engines' parts as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lvlm.bench.cost_rounds import CostResult
from lvlm.bench.costs import MeasuredCosts
from lvlm.bench.engine_costs import CostPlan


def cost_tables(results: Sequence[CostResult], plan: CostPlan, machine: Mapping[str, Any]) -> str:
    """Tables for people: milliseconds, alone and beside copies."""
    beside = f", and with {plan.copies} such engines at once" if plan.copies > 1 else ""
    lines = [
        f"{machine['cpu']}, {plan.threads} of {machine['cores']} cores for an engine, memory read "
        f"at {machine['read_bytes_per_s'] / 1e9:.1f} GB/s; median of {plan.repeats} repetitions, "
        f"alone{beside}."
    ]
    for result in results:
        lines += ["", f"{result.contender.label}:", ""]
        if result.measured is None:
            lines.append(f"failed: {result.error}")
            continue
        lines += ["| what | ms |", "| --- | --: |"]
        lines += [f"| {what} | {cell} |" for what, cell in _cells(result.measured)]
    return "\n".join(lines) + "\n"


def _cells(found: MeasuredCosts) -> list[tuple[str, str]]:
    def cell(alone: float | None, beside: float | None) -> str:
        return " / ".join(f"{1e3 * t:,.1f}" for t in (alone, beside) if t is not None)

    first, second = found.alone, found.beside
    rows = [("before the queue", cell(first.prepare, second.prepare if second else None))]
    if first.image is not None:
        rows.append(("an image", cell(first.image, second.image if second else None)))
    for number, read in enumerate(first.reads):
        behind = f" behind {read.behind:,}" if read.behind else ""
        other = second.reads[number].seconds if second else None
        images = "" if read.images == 1 else "s"
        what = f"{read.tokens:,} tokens{behind} of a prompt with {read.images} image{images}"
        rows.append((what, cell(read.seconds, other)))
    for number, step in enumerate(first.steps):
        other = second.steps[number].seconds if second else None
        what = f"a step of {step.rows}, {step.tokens:,} tokens each"
        rows.append((what, cell(step.seconds, other)))
    return rows


def costs_json(
    results: Sequence[CostResult],
    plan: CostPlan,
    machine: Mapping[str, Any],
    run: Mapping[str, Any],
) -> str:
    """Everything: ``run`` (command, time), the machine, the plan and the costs."""
    rows = []
    for result in results:
        row = {"contender": result.contender.label, "error": result.error, **result.opened}
        row |= {"peak_bytes": result.peak_bytes}
        rows.append(row | (asdict(result.measured) if result.measured else {}))
    data = {**run, "machine": machine, "plan": asdict(plan), "results": rows}
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"
