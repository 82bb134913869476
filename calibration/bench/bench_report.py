"""Results of a benchmark as a Markdown table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lvlm.bench.case_figures import CaseFigures, RoundSpread
from lvlm.bench.contenders import BenchError
from lvlm.bench.rounds import BenchPlan, Result
from lvlm.bench.workload import Case
from lvlm.core.output import whole_file

NONE = "—"
MEANINGS = (
    "TTFT: from the request's arrival to its first token, image and tokenizer included; ITL: "
    "from one token to the next, percentiles over all rounds; ±: half the range of the rounds.",
    "peak: most resident memory of the contender's process; cache: of one request when it is "
    "answered, where the contender tells.",
)
LONE = "of bandwidth: bytes a decode step must read (weights and cache) times tokens/s, over the "
LONE += "reading speed measured before the run."


def markdown(results: Sequence[Result], plan: BenchPlan, machine: Mapping[str, Any]) -> str:
    """A table per case, with the machine above and the meaning of the columns below."""
    lines = [about(plan, machine), ""]
    for case in plan.cases:
        lines += [*_table(results, case, machine), ""]
    lines += [f"- {meaning}" for meaning in MEANINGS]
    if any(case.is_lone for case in plan.cases):
        lines.append(f"- {LONE}")
    lines += [f"- {note}" for note in notes(results, plan)]
    return "\n".join(lines) + "\n"


def about(plan: BenchPlan, machine: Mapping[str, Any]) -> str:
    speed = machine["read_bytes_per_s"] / 1e9
    rounds = "one round" if plan.repeats == 1 else f"median of {plan.repeats} rounds in turn"
    versions = ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
    return (
        f"{machine['cpu']}, {plan.threads} of {machine['cores']} cores, memory read at "
        f"{speed:.1f} GB/s; {rounds} after {plan.warmup} to warm up; Python {machine['python']}, "
        f"{versions}."
    )


def _table(results: Sequence[Result], case: Case, machine: Mapping[str, Any]) -> list[str]:
    columns: dict[str, Callable[[Result, CaseFigures], str]] = {
        "TTFT ms": lambda _, f: _spread(f.ttft_ms, ",.0f" if f.ttft_ms.median >= 100 else ".1f"),
        "TTFT p95": lambda _, f: _number(f.ttft_p95_ms, ",.0f"),
        "ITL ms p50": lambda _, f: _number(f.itl_p50_ms, ".1f"),
        "p95": lambda _, f: _number(f.itl_p95_ms, ".1f"),
        "p99": lambda _, f: _number(f.itl_p99_ms, ".1f"),
    }
    if case.is_lone:
        del columns["TTFT p95"]
        columns["decode tokens/s"] = lambda _, f: _spread(f.decode_tokens_per_s, ".1f")
        columns["of bandwidth"] = lambda r, _: _number(
            r.bandwidth_share(case, machine["read_bytes_per_s"]), ".0%"
        )
    else:
        columns["tokens/s"] = lambda _, f: _spread(f.tokens_per_s, ".1f")
        columns["requests/s"] = lambda _, f: _number(f.requests_per_s.median, ".2f")
    columns["peak MB"] = lambda _, f: _megabytes(f.peak_bytes)
    columns["cache MB"] = lambda _, f: _megabytes(f.cache_bytes, ".1f")
    lines = [f"{title(case, results)}:", "", _line(["contender", *columns])]
    lines.append(_line(["---", *["--:"] * len(columns)]))
    for result in results:
        name = result.contender.label.replace("|", "\\|")
        name += f" ({result.contender.note})" if result.contender.note else ""
        figures = result.figures(case)
        cells = [NONE] * len(columns)
        if figures is not None:
            cells = [cell(result, figures) for cell in columns.values()]
        elif result.error is not None:
            cells = ["failed, see below", *cells[1:]]
        lines.append(_line([name, *cells]))
    return lines


def title(case: Case, results: Sequence[Result]) -> str:
    counts = [f.prompt_tokens for r in results if (f := r.figures(case)) is not None]
    images = f"{case.images} image{'s' if case.images != 1 else ''}"
    whole = f" ({max(counts):,} tokens in all)" if counts and case.images else ""
    asked = "" if case.is_lone else f", {case.requests} requests" * (case.rate is None)
    return (
        f"{case.text_tokens:,} text tokens and {images}{whole}, {case.new_tokens} new tokens, "
        f"{case.load}{asked}"
    )


def notes(results: Sequence[Result], plan: BenchPlan) -> list[str]:
    """Notes under the tables: errors, unequal prompts, noise."""
    notes = [f"{result.error}." for result in results if result.error is not None]
    for case in plan.cases:
        found = {r.contender.label: f for r in results if (f := r.figures(case)) is not None}
        counts = {label: f.prompt_tokens for label, f in found.items()}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{label} {count:,}" for label, count in counts.items())
            notes.append(f"prompts were not equally long, by the contenders' own count: {told}.")
    return notes


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(spread: RoundSpread | None, style: str) -> str:
    if spread is None:
        return NONE
    noise = f" ± {spread.noise:.0%}" if spread.low < spread.high else ""
    return f"{spread.median:{style}}{noise}"


def _number(value: float | None, style: str) -> str:
    return NONE if value is None else f"{value:{style}}"


def _megabytes(value: int | None, style: str = ",.0f") -> str:
    return NONE if value is None else f"{value / 1e6:{style}}"


def as_json(
    results: Sequence[Result], plan: BenchPlan, machine: Mapping[str, Any], run: Mapping[str, Any]
) -> str:
    """Everything: ``run`` (command, time), the machine, the plan, figures and every token time."""
    rows = [_plain(result, case, machine) for case in plan.cases for result in results]
    data = {**run, "machine": machine, "plan": asdict(plan), "results": rows}
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def _plain(result: Result, case: Case, machine: Mapping[str, Any]) -> dict[str, Any]:
    figures = result.figures(case)
    return {
        "contender": result.contender.label,
        "note": result.contender.note,
        "error": result.error,
        "case": asdict(case) | {"load": case.load},
        **result.opened,
        "figures": None if figures is None else figures.plain(),
        "bandwidth_share": result.bandwidth_share(case, machine["read_bytes_per_s"]),
        "rounds": [asdict(found) for found in result.rounds.get(case, [])],
    }


def write(path: Path, text: str) -> None:
    """Replaces ``path`` in one step. Raises BenchError."""
    with whole_file(path, BenchError) as partial:
        partial.write_text(text, encoding="utf-8")
