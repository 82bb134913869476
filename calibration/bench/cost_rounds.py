"""lvlm-bench --costs: what the parts of an engine take, alone and beside copies of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvlm.bench.contenders import BUNDLE, BenchError, Contender, Setup
from lvlm.bench.costs import Costs, EngineShape, MeasuredCosts, middle
from lvlm.bench.engine_costs import CostPlan, CostWork, cost_work
from lvlm.bench.process import Child
from lvlm.bench.workload import WorkloadPrompts
from lvlm.core.progress import Progress
from lvlm.core.typed_json import decode


@dataclass
class CostResult:
    """Costs of a contender, or the error that ended it."""

    contender: Contender
    opened: dict[str, Any] = field(default_factory=dict)
    measured: MeasuredCosts | None = None
    peak_bytes: int | None = None
    error: str | None = None


def measure_all(
    contenders: Sequence[Contender],
    writer: WorkloadPrompts,
    plan: CostPlan,
    logs: Path,
    progress: Progress,
) -> list[CostResult]:
    """One contender after the other. ``logs``: a folder for what the children print."""
    results = [CostResult(contender) for contender in contenders]
    for number, result in enumerate(results):
        label = result.contender.label
        with progress.stage(f"costs of {label}") as stage, ExitStack() as children:
            try:
                _measure(result, writer, plan, logs / str(number), children)
            except BenchError as error:
                result.error = stage.result = str(error)
    return results


def _measure(
    result: CostResult, writer: WorkloadPrompts, plan: CostPlan, log: Path, children: ExitStack
) -> None:
    contender = result.contender
    assert contender.manifest is not None
    setup = Setup(
        kind=BUNDLE,
        source=str(contender.folder),
        prompts=str(contender.folder),
        threads=plan.threads,
        lone=False,
        slots=plan.slots,
        text_tokens=max(plan.lengths) + plan.new_tokens,
        images=plan.images,
        settings=contender.settings,
    )
    growing = contender.manifest.in_place
    copies: list[Child] = []
    for number, cores in enumerate(parted_cores(plan.threads, plan.copies)):
        file = log.with_suffix(f".{number}.log")
        child = children.enter_context(Child(contender.label, file, plan.threads, cores))
        opened = child.open(setup)
        result.opened = result.opened or opened
        copies.append(child)
    answer = copies[0].costs(cost_work(writer, plan, growing=growing))
    result.peak_bytes = answer["peak_bytes"]
    beside = None
    if plan.copies > 1:  # other prompts: the first copy knows those
        beside = _at_once(copies, cost_work(writer, plan, growing=growing, again=1))
    result.measured = MeasuredCosts(
        contender.label,
        decode(EngineShape, answer["engine"], "engine"),
        plan.copies,
        decode(Costs, answer["costs"], "costs"),
        beside,
    )


def _at_once(copies: Sequence[Child], work: CostWork) -> Costs:
    """Costs while all copies are busy with the same."""
    with ThreadPoolExecutor(len(copies)) as pool:
        answers = list(pool.map(lambda child: child.costs(work), copies))
    return middle(decode(Costs, answer["costs"], "costs") for answer in answers)


def parted_cores(threads: int, copies: int) -> list[list[int] | None]:
    """Cores that each copy may use: ``threads`` of its own; None: any, where there is one copy
    alone."""
    if copies == 1:
        return [None]
    cores = sorted(os.sched_getaffinity(0))
    return [cores[threads * n : threads * (n + 1)] for n in range(copies)]
