"""The plot of an evaluation: quality against kept cache, and against decode time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lvlm.calibration.evaluate.answer_metrics import AnswerMetric
from lvlm.calibration.evaluate.eval_report import ReportRow
from lvlm.calibration.evaluate.records import ResultsError

PANEL = 4.2, 3.2  # inches
WIDE = 20.0  # from this ratio of largest to smallest on, perplexity is drawn on a log scale


def draw(
    path: Path, rows: Sequence[ReportRow], metrics: Sequence[AnswerMetric], timings: bool
) -> None:
    """A row of panels per metric; a line per bundle and kind of setting. Raises ResultsError."""
    columns = ["kept", "decode_ms"] if timings else ["kept"]
    size = PANEL[0] * len(columns), PANEL[1] * len(metrics) + 0.6
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(metrics), len(columns), squeeze=False)
    for metric, line in zip(metrics, panels, strict=True):
        for column, axes in zip(columns, line, strict=True):
            _panel(axes, rows, metric, column)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    try:
        # Without the version of the library, so that equal results are equal files
        figure.savefig(path, format="png", dpi=144, metadata={"Software": None})
    except OSError as error:
        raise ResultsError(f"{path} cannot be written: {error.strerror or error}") from None


def _panel(axes: Axes, rows: Sequence[ReportRow], metric: AnswerMetric, column: str) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        kind = row.variant.setting.partition(" ")[0]
        name = row.variant.bundle.label + (f" ({kind})" if kind == "kv-keep" else "")
        points = lines.setdefault(name, [])
        x, y = getattr(row, column), row.values[metric.name]
        if x is not None and y is not None:
            points.append((x, y))
    style = "o-" if column == "kept" else "o"  # times are too noisy to be joined
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True) if points else ([], []), style, label=name)
    full = [row.values[metric.name] for row in rows if row.variant.bundle.is_full]
    for value in full:
        if value is not None:
            axes.axhline(value, color="grey", linestyle=":", linewidth=1, zorder=0)
    values = [y for points in lines.values() for _, y in points]
    if metric.name == "ppl" and values and max(values) > WIDE * min(values):
        axes.set_yscale("log")
    axes.set_ylabel(metric.title)
    if column == "kept":
        axes.set_xlabel("kept cache")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    else:
        axes.set_xlabel("decode time, ms per token")
    axes.grid(alpha=0.3)
