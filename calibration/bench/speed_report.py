"""The report of a run: one request at several lengths and many at once, each contender a row, and
how bundles compare with the best of the other runtimes, round by round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lvlm.bench.bench_report import MEANINGS, about, notes
from lvlm.bench.case_figures import Round, RoundSpread, percentile
from lvlm.bench.rounds import BenchPlan, Result
from lvlm.bench.workload import Case

NONE = "—"


@dataclass(frozen=True)
class ReportFigure:
    """A number of a round, None where the contender has none, and whether ``more`` of it is
    better."""

    name: str
    of: Callable[[Round], float | None]
    style: str
    more: bool = False


LONE = (
    ReportFigure("TTFT s", lambda r: statistics.median(r.ttft), ".2f"),
    ReportFigure("decode tokens/s", lambda r: r.decode_tokens_per_s, ".1f", more=True),
    ReportFigure("peak MB", lambda r: _megabytes(r.peak_bytes), ",.0f"),
)
LOAD = (
    ReportFigure("tokens/s", lambda r: r.tokens_per_s, ".1f", more=True),
    ReportFigure("TTFT s", lambda r: statistics.median(r.ttft), ".2f"),
    ReportFigure("ITL p95 ms", lambda r: _gap(r), ",.0f"),
)


def report(results: Sequence[Result], plan: BenchPlan, machine: Mapping[str, Any]) -> str:
    """The tables of a run's ``results``, with the machine above and the meaning below."""
    lone = [case for case in plan.cases if case.is_lone]
    load = [case for case in plan.cases if not case.is_lone]
    lines = [about(plan, machine), ""]
    for cases, figures, head in (
        (lone, LONE, "One request at a time"),
        (load, LOAD, "Clients, each asking when it has its answer"),
    ):
        if not cases:
            continue
        names = " / ".join(figure.name for figure in figures)
        first = cases[0]
        asked = f"{first.images} image(s), {first.new_tokens} new tokens"
        columns = [_column(case, results) for case in cases]
        lines += [f"{head}, {asked}: {names}.", "", *_head(columns)]
        lines += [_row(r, [_cell(r, case, figures) for case in cases]) for r in results]
        if compared := _compared(results):
            lines += ["", f"{_beside(results)}: the same figures as ratios, round by round.", ""]
            lines += _head(columns)
            lines += [
                _row(r, [_ratios(r, _others(results), case, figures) for case in cases])
                for r in compared
            ]
        lines.append("")
    lines += [f"- {meaning}" for meaning in MEANINGS]
    lines.append(
        "- Ratios: the median over the rounds, and the lowest and highest. Of tokens/s above 1 is "
        "better, of all else below."
    )
    lines += [f"- {note}" for note in notes(results, plan)]
    return "\n".join(lines) + "\n"


def ratio(
    own: Sequence[Round], others: Sequence[Sequence[Round]], figure: ReportFigure
) -> RoundSpread | None:
    """A figure beside the best of others, over the rounds that all have; None where none of them
    has it."""
    found = []
    for mine, *theirs in zip(own, *others, strict=False):
        value, values = figure.of(mine), [figure.of(one) for one in theirs]
        known = [v for v in values if v is not None]
        best = (max if figure.more else min)(known, default=None)
        if value is None or not best:
            return None
        found.append(value / best)
    return RoundSpread.of(found) if found else None


def _others(results: Sequence[Result]) -> list[Result]:
    """The other runtimes; without any the first bundle."""
    peers = [r for r in results if r.contender.peer is not None]
    return peers or list(results[:1])


def _compared(results: Sequence[Result]) -> list[Result]:
    others = _others(results)
    return [r for r in results if all(r is not other for other in others)]


def _beside(results: Sequence[Result]) -> str:
    if any(r.contender.peer is not None for r in results):
        return "Beside the best of the other runtimes"
    return f"Beside {results[0].contender.label}"


def _column(case: Case, results: Sequence[Result]) -> str:
    """The tokens of a prompt, images' too, or the number of clients."""
    if not case.is_lone:
        return f"{case.concurrency}"
    counts = [f.prompt_tokens for r in results if (f := r.figures(case)) is not None]
    return f"{max(counts):,} tokens" if counts else f"{case.text_tokens:,} text tokens"


def _head(columns: Sequence[str]) -> list[str]:
    return [_line(["", *columns]), _line(["---", *["--:"] * len(columns)])]


def _row(result: Result, cells: Sequence[str]) -> str:
    return _line([result.contender.label.replace("|", "\\|"), *cells])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rounds(result: Result, case: Case) -> list[Round]:
    return [] if result.error is not None else result.rounds.get(case, [])


def _cell(result: Result, case: Case, figures: Sequence[ReportFigure]) -> str:
    if result.error is not None:
        return "failed"
    rounds = _rounds(result, case)
    return " / ".join(_number(_median(rounds, figure), figure.style) for figure in figures)


def _median(rounds: Sequence[Round], figure: ReportFigure) -> float | None:
    found = [value for r in rounds if (value := figure.of(r)) is not None]
    return statistics.median(found) if found else None


def _ratios(
    result: Result, others: Sequence[Result], case: Case, figures: Sequence[ReportFigure]
) -> str:
    theirs = [rounds for other in others if (rounds := _rounds(other, case))]
    own, cells = _rounds(result, case), []
    for figure in figures:
        spread = ratio(own, theirs, figure) if theirs else None
        if spread is None:
            cells.append(NONE)
            continue
        width = f" ({spread.low:.2f} to {spread.high:.2f})" if len(own) > 1 else ""
        cells.append(f"{spread.median:.2f}{width}")
    return " / ".join(cells)


def _number(value: float | None, style: str) -> str:
    return NONE if value is None else f"{value:{style}}"


def _megabytes(value: int | None) -> float | None:
    return None if value is None else value / 1e6


def _gap(found: Round) -> float | None:
    return 1e3 * percentile(found.gaps, 95) if found.gaps else None
