"""The plot of a benchmark: bars for lone streams, lines over the load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lvlm.bench.case_figures import CaseFigures, RoundSpread
from lvlm.bench.contenders import BenchError
from lvlm.bench.rounds import Result
from lvlm.bench.workload import Case

PANEL = 4.0, 3.0  # inches
Value = Callable[[CaseFigures], RoundSpread | float | None]
LONE: dict[str, Value] = {
    "time to first token, ms": lambda f: f.ttft_ms,
    "decode, tokens/s": lambda f: f.decode_tokens_per_s,
    "peak memory, MB": lambda f: None if f.peak_bytes is None else f.peak_bytes / 1e6,
}
LOADED: dict[str, Value] = {
    "tokens/s, all requests": lambda f: f.tokens_per_s,
    "time to first token, ms": lambda f: f.ttft_ms,
    "between tokens, p95 ms": lambda f: f.itl_p95_ms,
}


def draw(path: Path, results: Sequence[Result], cases: Sequence[Case]) -> None:
    """A row of panels per lone case, and one per kind of load. Raises BenchError."""
    lone = [case for case in cases if case.is_lone]
    loads = [
        (name, row)
        for name, row in (
            ("requests at a time", [c for c in cases if c.rate is None and not c.is_lone]),
            ("requests per second", [c for c in cases if c.rate is not None]),
        )
        if row
    ]
    rows = len(lone) + len(loads)
    figure = Figure(figsize=(PANEL[0] * 3, PANEL[1] * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 3, squeeze=False)
    for line, case in zip(panels, lone, strict=False):
        for axes, (name, value) in zip(line, LONE.items(), strict=True):
            _bars(axes, results, case, value)
            axes.set_title(name, fontsize="medium")
        line[0].set_ylabel(f"{case.text_tokens:,} text tokens")
    for line, (label, row) in zip(panels[len(lone) :], loads, strict=True):
        for axes, (name, value) in zip(line, LOADED.items(), strict=True):
            _lines(axes, results, row, value)
            axes.set_title(name, fontsize="medium")
            axes.set_xlabel(label)
        line[0].legend(fontsize="small")
    try:
        # Without a date or the library's version: equal results are equal files
        meta = {"Software": None} if path.suffix == ".png" else {"Date": None}
        figure.savefig(path, format=path.suffix[1:], dpi=144, metadata=meta)
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror or error}") from None


def _bars(axes: Axes, results: Sequence[Result], case: Case, value: Value) -> None:
    labels, heights, errors = list[str](), list[float](), list[tuple[float, float]]()
    for result in results:
        middle, below, above = _point(result, case, value)
        labels.append(result.contender.label)
        heights.append(middle or 0.0)
        errors.append((below, above))
    places = range(len(labels))
    axes.barh(places, heights, xerr=list(zip(*errors, strict=True)), color="tab:blue", alpha=0.8)
    axes.set_yticks(places, labels, fontsize="small")
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")


def _lines(axes: Axes, results: Sequence[Result], cases: Sequence[Case], value: Value) -> None:
    """A line per contender and length of prompt."""
    lengths = list(dict.fromkeys(case.text_tokens for case in cases))
    for result in results:
        for length in lengths:
            points = [
                (case.rate or case.concurrency, middle)
                for case in cases
                if case.text_tokens == length
                and (middle := _point(result, case, value)[0]) is not None
            ]
            name = result.contender.label + (f", {length:,} tokens" if len(lengths) > 1 else "")
            axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _point(result: Result, case: Case, value: Value) -> tuple[float | None, float, float]:
    """The figure, and how far the rounds go below and above it."""
    figures = result.figures(case)
    found = None if figures is None else value(figures)
    if isinstance(found, RoundSpread):
        return found.median, found.median - found.low, found.high - found.median
    return found, 0.0, 0.0
