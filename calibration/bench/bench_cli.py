"""``lvlm-bench``: speed and memory of bundles, alone or under load, beside other runtimes."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm.bench.bench_arguments import (
    COST_LENGTHS,
    COST_REPEATS,
    COST_SLOTS,
    DURATION,
    LENGTHS,
    REPEATS,
    REPORT_CLIENTS,
    REPORT_TOKENS,
    REQUESTS,
    SLOTS,
    check_arguments,
    make_parser,
)
from lvlm.core.console import run_main

if TYPE_CHECKING:
    from lvlm.bench.contenders import Contender
    from lvlm.bench.rounds import BenchPlan
    from lvlm.bench.workload import Case, WorkloadPrompts
    from lvlm.core.progress import Progress

FAILED = 2  # the status if a contender failed while others were measured
PACKAGES = (
    *("lvlm-deploy", "numpy", "onnxruntime", "openvino"),
    *("torch", "transformers", "onnxruntime-genai", "openvino-genai"),
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_main("lvlm-bench", lambda: _run(make_parser().parse_args(arguments), arguments))


def _run(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    check_arguments(args)
    from lvlm.bench.contenders import bundle_contender, check_fit, peer_contender
    from lvlm.core.progress import Progress

    common = {"keep": args.keep, "kv-keep": args.kv_keep, "device": args.device}
    common = {name: value for name, value in common.items() if value is not None}
    contenders = [bundle_contender(text, common, args.verify) for text in args.bundles]
    contenders += [peer_contender(text) for text in args.against]
    _check_labels(contenders)
    if args.costs:
        return _costs(args, arguments, contenders)
    plans = _report_plans(args, contenders) if args.report else [_plan(args)]
    cases = [case for plan in plans for case in plan.cases]
    check_fit(
        contenders,
        max(case.text_tokens + case.new_tokens for case in cases),
        max(case.images for case in cases),
    )
    progress = Progress(sum(_stages(contenders, plan) for plan in plans), quiet=args.quiet)
    return _measure(args, arguments, contenders, plans, progress)


def _measure(
    args: argparse.Namespace,
    arguments: Sequence[str],
    contenders: Sequence[Contender],
    plans: Sequence[BenchPlan],
    progress: Progress,
) -> int:
    """Measure plan after plan, each with contenders loaded anew, and print all as one."""
    import tempfile
    from dataclasses import replace

    from lvlm.bench import bench_report, speed_report
    from lvlm.bench.rounds import joined, measure
    from lvlm.bench.workload import work

    first = contenders[0]
    assert first.folder is not None
    writer = _writer(first)
    plan = replace(plans[0], cases=tuple(case for each in plans for case in each.cases))
    for case in plan.cases:
        work(case, writer, plan.seed)  # what cannot be asked is known before anything is loaded
    sources = _sources(args, contenders, progress)
    about, run = _circumstances(args, arguments, plan.threads)
    with tempfile.TemporaryDirectory(prefix="lvlm-bench-") as logs:
        where = (first.folder, writer)
        results = joined(
            [measure(contenders, sources, *where, each, Path(logs), progress) for each in plans]
        )
    if args.json:
        bench_report.write(args.json, bench_report.as_json(results, plan, about, run))
    if args.plot:
        from lvlm.bench.bench_plot import draw

        draw(args.plot, results, plan.cases)
    if not args.quiet:
        tables = speed_report.report if args.report else bench_report.markdown
        print(tables(results, plan, about), end="")
    return _status([result.error for result in results])


def _costs(
    args: argparse.Namespace, arguments: Sequence[str], contenders: Sequence[Contender]
) -> int:
    """Time that the parts of each bundle's engine take."""
    import tempfile

    from lvlm.bench import bench_report
    from lvlm.bench.contenders import check_fit
    from lvlm.bench.cost_report import cost_tables, costs_json
    from lvlm.bench.cost_rounds import measure_all
    from lvlm.bench.engine_costs import CostPlan, cost_work
    from lvlm.bench.machine import check_copies
    from lvlm.core.progress import Progress

    room = min(c.manifest.capacity.max_text_len for c in contenders if c.manifest is not None)
    fitting = [n for n in COST_LENGTHS if n + args.new_tokens <= room]
    plan = CostPlan(
        lengths=tuple(args.prompt_tokens or fitting or COST_LENGTHS[:1]),
        images=args.images,
        new_tokens=args.new_tokens,
        slots=args.slots or COST_SLOTS,
        threads=check_copies(args.copies, args.threads),
        copies=args.copies,
        warmup=args.warmup,
        repeats=args.repeats or COST_REPEATS,
        seed=args.seed,
    )
    check_fit(contenders, max(plan.lengths) + plan.new_tokens, plan.images)
    writer = _writer(contenders[0])
    cost_work(writer, plan, growing=False)  # what cannot be asked is known before
    about, run = _circumstances(args, arguments, plan.threads)
    progress = Progress(len(contenders), quiet=args.quiet)
    with tempfile.TemporaryDirectory(prefix="lvlm-bench-") as logs:
        results = measure_all(contenders, writer, plan, Path(logs), progress)
    if args.json:
        bench_report.write(args.json, costs_json(results, plan, about, run))
    if not args.quiet:
        print(cost_tables(results, plan, about), end="")
    return _status([result.error for result in results])


def _writer(first: Contender) -> WorkloadPrompts:
    """Prompts by the tokenizer of a bundle."""
    from lvlm.bench.workload import WorkloadPrompts, prompt_maker

    assert first.folder is not None
    assert first.manifest is not None
    maker = prompt_maker(first.folder, first.manifest)
    return WorkloadPrompts(maker, first.manifest.special_tokens.get("bos_token"))


def _circumstances(
    args: argparse.Namespace, arguments: Sequence[str], threads: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The machine, and the run: command, time, a warning if others use the machine."""
    from datetime import UTC, datetime

    from lvlm.bench import machine

    warning = machine.busy()
    if warning and not args.quiet:
        print(f"lvlm-bench: warning: {warning}", file=sys.stderr)
    about = machine.describe(threads, PACKAGES)
    run = {
        "command": shlex.join(["lvlm-bench", *arguments]),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "warning": warning,
    }
    return about, run


def _status(errors: Sequence[str | None]) -> int:
    failed = [error for error in errors if error is not None]
    for error in failed:
        print(f"lvlm-bench: error: {error}", file=sys.stderr)
    return FAILED if failed else 0


def _sources(
    args: argparse.Namespace, contenders: Sequence[Contender], progress: Progress
) -> dict[str, Path]:
    """The folder that each contender loads, by label: a bundle, or what its checkpoint became."""
    from lvlm.bench.contenders import find_checkpoint
    from lvlm.bench.convert import converted, default_cache

    sources = {c.label: c.folder for c in contenders if c.folder is not None}
    if args.against:
        pythons = dict(pair.split("=", 1) for pair in args.converter_python)
        checkpoint = find_checkpoint(args.checkpoint, contenders)
        peers = [c for c in contenders if c.peer is not None]
        cache = args.cache or default_cache()
        sources |= converted(peers, checkpoint, cache, pythons, progress)
    return sources


def _check_labels(contenders: Sequence[Contender]) -> None:
    from lvlm.core.errors import ParameterError

    labels = [contender.label for contender in contenders]
    for label in labels:
        if labels.count(label) > 1:
            raise ParameterError(
                f"two contenders are called '{label}'; leave one out, or give folders of "
                "different names"
            )


def _plan(args: argparse.Namespace) -> BenchPlan:
    from lvlm.bench.machine import cores
    from lvlm.bench.rounds import BenchPlan

    cases = tuple(_cases(args))
    concurrency = SLOTS if args.rate else max(case.concurrency for case in cases)
    loaded = bool(args.concurrency or args.rate)
    return BenchPlan(
        cases=cases,
        warmup=args.warmup,
        repeats=args.repeats or (1 if loaded else REPEATS),
        seed=args.seed,
        threads=args.threads or cores(),
        slots=args.slots or concurrency,
        apart=args.apart,
        memory_budget=args.memory_budget,
    )


def _report_plans(
    args: argparse.Namespace, contenders: Sequence[Contender]
) -> tuple[BenchPlan, ...]:
    """Lone requests of each length, then clients with prompts of the first one."""
    from dataclasses import replace

    from lvlm.bench.machine import cores
    from lvlm.bench.rounds import BenchPlan
    from lvlm.bench.workload import Case

    manifest = contenders[0].manifest
    assert manifest is not None
    images = args.images * manifest.images.tokens
    rooms = [c.manifest.capacity.max_text_len for c in contenders if c.manifest is not None]
    room = min(rooms) - args.new_tokens
    fitting = [n - images for n in REPORT_TOKENS if 0 < n - images <= room]
    lengths = args.prompt_tokens or fitting or LENGTHS
    lone = BenchPlan(
        cases=tuple(Case(n, args.images, args.new_tokens, 1, 1) for n in lengths),
        warmup=args.warmup,
        repeats=args.repeats or REPEATS,
        seed=args.seed,
        threads=args.threads or cores(),
        slots=args.slots or 1,
        apart=args.apart,
    )
    clients = args.concurrency or REPORT_CLIENTS
    load = tuple(
        Case(lengths[0], args.images, args.new_tokens, args.requests or max(n, REQUESTS), n)
        for n in clients
    )
    return lone, replace(lone, cases=load, slots=args.slots or max(clients))


def _cases(args: argparse.Namespace) -> list[Case]:
    from lvlm.bench.workload import Case

    cases = []
    for length in args.prompt_tokens or LENGTHS:
        shape: dict[str, Any] = {
            "text_tokens": length,
            "images": args.images,
            "new_tokens": args.new_tokens,
        }
        requests = args.requests or REQUESTS
        for clients in args.concurrency:
            cases.append(Case(**shape, requests=requests, concurrency=clients))
        for rate in args.rate:
            duration = args.duration or DURATION
            cases.append(Case(**shape, requests=0, concurrency=0, rate=rate, duration=duration))
        if not args.concurrency and not args.rate:
            cases.append(Case(**shape, requests=1, concurrency=1))
    return cases


def _stages(contenders: Sequence[Contender], plan: BenchPlan) -> int:
    """Stages of the progress; conversions come on top."""
    rounds = len(plan.cases) * (len(contenders) if plan.apart else 1)
    return len(contenders) + rounds
