"""Rounds of all contenders in turn, so that what the machine does meanwhile meets them alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvlm.bench.case_figures import CaseFigures, Round
from lvlm.bench.contenders import BUNDLE, BenchError, Contender, Setup
from lvlm.bench.process import Child
from lvlm.bench.workload import Case, WorkloadPrompts, work
from lvlm.core.progress import Progress

WARM_UP_SEEDS = 1_000_000  # rounds that do not count ask other questions
CASE_SEEDS = 10_000  # and so do cases: an engine knows what it was asked before


@dataclass(frozen=True)
class BenchPlan:
    """``apart``: contenders one after another, each loaded alone, instead of in turn."""

    cases: tuple[Case, ...]
    warmup: int
    repeats: int
    seed: int
    threads: int
    slots: int
    apart: bool
    memory_budget: str | None = None


@dataclass
class Result:
    """Results of a contender: the rounds of each case, and the error that ended it, if any."""

    contender: Contender
    rounds: dict[Case, list[Round]] = field(default_factory=dict)
    opened: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def figures(self, case: Case) -> CaseFigures | None:
        rounds = self.rounds.get(case)
        return CaseFigures.of(rounds) if rounds and self.error is None else None

    def bandwidth_share(self, case: Case, read_bytes_per_s: float) -> float | None:
        """Share of the machine's reading speed that a lone stream's decode steps take: weights and
        the cache at the end of an answer; None where that is not known."""
        figures, weights = self.figures(case), self.opened.get("facts", {})
        read = weights.get("decode_weight_bytes")
        if figures is None or figures.decode_tokens_per_s is None or read is None:
            return None
        if not case.is_lone or figures.cache_bytes is None:
            return None
        moved = (read + figures.cache_bytes) * figures.decode_tokens_per_s.median
        return float(moved / read_bytes_per_s)


def measure(
    contenders: Sequence[Contender],
    sources: Mapping[str, Path],
    prompts: Path,
    writer: WorkloadPrompts,
    plan: BenchPlan,
    logs: Path,
    progress: Progress,
) -> list[Result]:
    """One result per contender. One that fails keeps its error and takes no part from then on.

    ``sources``: what each loads, by label; ``prompts``: the bundle that makes token ids; ``logs``:
    a folder for what the children print.
    """
    results = [Result(contender) for contender in contenders]
    groups = [[result] for result in results] if plan.apart else [results]
    for group in groups:
        with ExitStack() as children:
            running = _open(group, sources, prompts, plan, logs, children, progress)
            for case in plan.cases:
                _rounds(case, running, writer, plan, progress)
    return results


def _open(
    group: Sequence[Result],
    sources: Mapping[str, Path],
    prompts: Path,
    plan: BenchPlan,
    logs: Path,
    children: ExitStack,
    progress: Progress,
) -> list[tuple[Result, Child]]:
    running = []
    for result in group:
        contender = result.contender
        setup = Setup(
            kind=contender.peer.name if contender.peer else BUNDLE,
            source=str(sources[contender.label]),
            prompts=str(prompts),
            threads=plan.threads,
            lone=all(case.is_lone for case in plan.cases),
            slots=plan.slots,
            text_tokens=max(case.text_tokens + case.new_tokens for case in plan.cases),
            images=max(case.images for case in plan.cases),
            settings=contender.settings,
            memory_budget=plan.memory_budget,
        )
        log = logs / f"{len(list(logs.iterdir()))}.log"
        with progress.stage(f"load {contender.label}") as stage:
            child = children.enter_context(Child(contender.label, log, plan.threads))
            try:
                result.opened = child.open(setup)
            except BenchError as error:
                result.error = stage.result = str(error)
                continue
        running.append((result, child))
    return running


def _rounds(
    case: Case,
    running: list[tuple[Result, Child]],
    writer: WorkloadPrompts,
    plan: BenchPlan,
    progress: Progress,
) -> None:
    """Warm-up and rounds of one case; who begins changes from round to round."""
    total = (plan.warmup + plan.repeats) * len(running)
    with progress.stage(f"{case.text_tokens} text tokens, {case.load}") as stage:
        done = 0
        for number in range(-plan.warmup, plan.repeats):
            asked = work(case, writer, round_seed(plan, case, number))
            first = number % max(1, len(running))
            for result, child in running[first:] + running[:first]:
                done += 1
                if result.error is not None:
                    continue
                try:
                    found = child.round(asked)
                except BenchError as error:
                    result.error = str(error)
                    continue
                stage.add_item(done, total, skipped=0)
                if number >= 0:
                    result.rounds.setdefault(case, []).append(found)


def round_seed(plan: BenchPlan, case: Case, number: int) -> int:
    """Seed of what a case's round asks, below 0 of one before those that count."""
    others = CASE_SEEDS * plan.cases.index(case)
    return plan.seed + number + others + (WARM_UP_SEEDS if number < 0 else 0)


def joined(measured: Sequence[Sequence[Result]]) -> list[Result]:
    """Results of the same contenders on several plans as those of one; an error of any is its."""
    first, *others = measured
    for more in others:
        for result, further in zip(first, more, strict=True):
            result.rounds |= further.rounds
            result.error = result.error or further.error
    return list(first)
