"""The plot of the tables: exact answers by what is left, of the best rows of each kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import PercentFormatter

from cost_tables.tables import ALL, MeasuredCell, figure
from lvlm.calibration.datasets.evaluation_samples import EvaluationSample
from lvlm.calibration.datasets.scenes.drawing import DENSITIES

BEST = 3  # rows of a group that have a colour; the others are grey
STYLES = {"reductions": "o-", "caches": "s--", "both": "*:"}
TITLES = {"reductions": "tokens", "caches": "cache", "both": "both"}
COLOURS = {
    "reductions": ("#1f5fa8", "#2ca4c8", "#5b4fb0"),
    "caches": ("#c0392b", "#e67e22", "#b8860b"),
    "both": ("#1e8449", "#7fb800", "#222222"),
}
TICKS = (0.06, 0.1, 0.2, 0.35, 0.5, 1.0)


def draw(path: Path, found: Sequence[MeasuredCell], asked: Sequence[EvaluationSample]) -> None:
    """A panel for each density by the cache that is left, and one of all by what prefill
    computes."""
    none, rows = found[0], _rows(found)
    canvas = Canvas(figsize=(10.5, 8), layout="constrained")
    FigureCanvasAgg(canvas)
    panels = canvas.subplots(2, 2, sharey=True).ravel()
    colours = _colours(rows, none, asked)
    for axes, column in zip(panels, (*DENSITIES, ALL), strict=True):
        full = figure("exact", none, none, asked, column)
        axes.axhspan(*(100 * v for v in full.interval), color="#dddddd", zorder=0)
        axes.axhline(100 * full.value, color="#777777", linewidth=1, zorder=1)
        for name, points in rows.items():
            _line(axes, name, points, none, asked, column, colours)
        axes.set_title(
            f"{column}: by the cache that is left"
            if column != ALL
            else "all images: by the tokens that prefill computes"
        )
        axes.set_xscale("log")
        axes.set_xticks(TICKS, minor=False)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.minorticks_off()
        axes.invert_xaxis()
        axes.set_ylabel("exact answers, %")
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small")
    canvas.suptitle(
        f"{len(asked)} questions a point; grey: none, with its 95 % interval; thin: the other rows"
    )
    canvas.savefig(path, format="png", dpi=110, metadata={"Software": None})


def _rows(found: Sequence[MeasuredCell]) -> dict[str, list[MeasuredCell]]:
    rows: dict[str, list[MeasuredCell]] = defaultdict(list)
    for one in found:
        if one.left is not None and one.cell.row.group in STYLES:
            rows[one.cell.name].append(one)
    return rows


def _colours(
    rows: dict[str, list[MeasuredCell]], none: MeasuredCell, asked: Sequence[EvaluationSample]
) -> dict[str, str]:
    """Those of the best rows of each group, by the mean of their exact answers at the fractions
    that all of them reach."""
    found: dict[str, str] = {}
    for group, colours in COLOURS.items():
        mine = {n: points for n, points in rows.items() if points[0].cell.row.group == group}
        reached = min((len(points) for points in mine.values()), default=0)
        worth = {
            name: sum(figure("exact", m, none, asked, ALL).value for m in points[:reached])
            for name, points in mine.items()
        }
        best = sorted(worth, key=lambda name: -worth[name])[:BEST]
        found |= dict(zip(best, colours, strict=False))
    return found


def _line(
    axes: Axes,
    name: str,
    points: Sequence[MeasuredCell],
    none: MeasuredCell,
    asked: Sequence[EvaluationSample],
    column: str,
    colours: dict[str, str],
) -> None:
    group = points[0].cell.row.group
    if column == ALL and group == "caches":
        return  # prefill computes all
    spots = [
        (
            (m.left or 0.0) if column == ALL else m.cache,
            100 * figure("exact", m, none, asked, column).value,
        )
        for m in points
    ]
    x, y = zip(*sorted(spots), strict=True)
    if name in colours:
        size = 11 if group == "both" else 6
        label = f"{TITLES[group]}: {name}"
        axes.plot(x, y, STYLES[group], color=colours[name], label=label, markersize=size)
    else:
        axes.plot(x, y, STYLES[group], color="#bbbbbb", linewidth=0.8, markersize=3, zorder=1)
