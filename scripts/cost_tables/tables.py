"""Tables of what was measured: a row per cell, a column per density."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cost_tables.intervals import Interval, bootstrap, wilson
from cost_tables.rows import Cell
from lvlm.calibration.datasets.evaluation_samples import EvaluationSample
from lvlm.calibration.datasets.scenes.drawing import DENSITIES
from lvlm.calibration.evaluate.answer_metrics import METRICS
from lvlm.calibration.evaluate.records import SampleRecord

ALL = "all"
COLUMNS = (*DENSITIES, ALL)


@dataclass(frozen=True)
class MeasuredCell:
    """A cell, the part of image tokens that enter its blocks (None: it cannot be reached), and its
    records, in the order of the questions."""

    cell: Cell
    left: float | None
    greedy: Sequence[SampleRecord]
    forced: Sequence[SampleRecord]

    @property
    def cache(self) -> float:
        """The fraction of the prompt's entries in the cache after prefill: mean over layers,
        prompts."""
        return float(np.mean([record.kept for record in self.greedy]))


@dataclass(frozen=True)
class Figure:
    value: float
    interval: Interval


def tables(found: Sequence[MeasuredCell], asked: Sequence[EvaluationSample]) -> str:
    """One for each metric, in Markdown."""
    parts = [_table(title, name, found, asked) for name, title in TITLES.items()]
    missed = [f"{m.cell.name} at {100 * (m.cell.left or 0):.0f} %" for m in found if m.left is None]
    notes = f"\nOut of reach: {', '.join(missed)}.\n" if missed else ""
    return f"{len(asked)} questions a row.\n\n" + "\n".join(parts) + notes


TITLES = {
    "exact": "Exact answers, % (Wilson's 95 % interval); lost: of none's, by the same questions "
    "(bootstrap)",
    "rouge": "ROUGE-L against none's text, % (bootstrap over questions)",
    "ppl": "Perplexity (bootstrap over questions)",
}


def _table(
    title: str, name: str, found: Sequence[MeasuredCell], asked: Sequence[EvaluationSample]
) -> str:
    lost = ["lost"] if name == "exact" else []
    heads = ["recipe", "prefill", "cache", *COLUMNS, *lost]
    lines = [f"**{title}**", "", f"| {' | '.join(heads)} |"]
    lines.append("| --- |" + " --: |" * (len(heads) - 1))
    none = found[0]
    for one in found:
        if one.left is None:
            continue
        figures = [figure(name, one, none, asked, column) for column in COLUMNS]
        cells = [_written(name, f) for f in figures]
        if lost and one is not none:
            cells.append(_written("lost", figure("lost", one, none, asked, ALL)))
        elif lost:
            cells.append("")
        shares = f"{100 * one.left:.0f} % | {100 * one.cache:.0f} %"
        lines.append(f"| {one.cell.name} | {shares} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _written(name: str, found: Figure) -> str:
    (low, high), value = found.interval, found.value
    if name == "ppl":
        return f"{value:.3f} ({low:.2f}–{high:.2f})"  # noqa: RUF001 - a dash, as ranges have it
    return f"{100 * value:.0f} ({100 * low:.0f}–{100 * high:.0f})"  # noqa: RUF001 - likewise


def figure(
    name: str, one: MeasuredCell, none: MeasuredCell, asked: Sequence[EvaluationSample], column: str
) -> Figure:
    """A metric (exact, lost, rouge, ppl) over the questions of a density."""
    chosen = [n for n, s in enumerate(asked) if column in (ALL, s.id.rpartition("-")[2])]
    scores = np.array([_score(name, one, none, asked, n) for n in chosen])
    if name == "exact":
        right, count = float(scores[:, 0].sum()), len(scores)
        return Figure(right / count, wilson(right, count))
    if name == "ppl":
        return _bootstrapped(scores, lambda sums: np.exp(np.minimum(sums[:, 0] / sums[:, 1], 50)))
    return _bootstrapped(scores, lambda sums: sums[:, 0] / sums[:, 1])


def _bootstrapped(scores: np.ndarray, value: Callable[[np.ndarray], np.ndarray]) -> Figure:
    return Figure(float(value(scores.sum(0)[None])[0]), bootstrap(scores, value))


def _score(
    name: str, one: MeasuredCell, none: MeasuredCell, asked: Sequence[EvaluationSample], number: int
) -> tuple[float, float]:
    """Sum and weight of one question."""
    sample, full = asked[number], none.greedy[number].text
    exact = METRICS["accuracy"]
    if name == "ppl":
        return METRICS["ppl"].score(sample, one.forced[number], full)
    if name == "rouge":
        return METRICS["rouge"].score(sample, one.greedy[number], full)
    mine = exact.score(sample, one.greedy[number], full)
    if name == "exact":
        return mine
    theirs = exact.score(sample, none.greedy[number], full)
    return theirs.total - mine.total, 1.0
