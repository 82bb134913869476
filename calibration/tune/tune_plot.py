"""The plot of a search: quality against the first token, and against throughput."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lvlm.calibration.evaluate.records import ResultsError
from lvlm.calibration.tune.candidates import Candidate
from lvlm.calibration.tune.search import Choice

SIZE = 9.6, 4.0  # inches
AREA = 60, 300  # of the least and the most memory, in points


def draw(path: Path, choice: Choice, best: Sequence[Candidate]) -> None:
    """Two panels; a disc is as large as its memory. Raises ResultsError."""
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    known = [t for t in choice.trials if t.loss and t.speed and t.speed.error is None]
    largest = max((t.prediction.memory for t in known), default=1)
    for axes, (name, title) in zip(
        figure.subplots(1, 2),
        (("ttft_ms", "first token, ms"), ("tokens_per_s", "tokens/s")),
        strict=True,
    ):
        for trial in known:
            assert trial.loss is not None
            chosen = choice.chosen is not None and trial.candidate == choice.chosen.candidate
            color = "tab:red" if chosen else "tab:blue" if trial.candidate in best else "silver"
            area = AREA[0] + (AREA[1] - AREA[0]) * trial.prediction.memory / largest
            x = getattr(trial.speed, name)
            axes.scatter([x], [trial.loss.quality], s=area, color=color, alpha=0.7, linewidths=0)
            if chosen or trial.candidate in best:
                axes.annotate(trial.candidate.label, (x, trial.loss.quality), fontsize="x-small")
        axes.set_xlabel(title)
        axes.set_ylabel("quality")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, format="png", dpi=144, metadata={"Software": None})
    except OSError as error:
        raise ResultsError(f"{path} cannot be written: {error.strerror or error}") from None
