"""scripts/eval_reductions.py: what its tables say of given answers, and how cells are chosen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cost_tables.intervals import bootstrap, wilson
from cost_tables.rows import ROWS, Cell, cells
from cost_tables.tables import MeasuredCell, figure, tables

from lvlm.calibration.datasets.evaluation_samples import EvaluationSample
from lvlm.calibration.datasets.scenes.drawing import DENSITIES
from lvlm.calibration.evaluate.records import SampleRecord

PICTURE = (np.zeros((2, 2, 3), np.uint8),)
ASKED = [
    EvaluationSample(f"{n}-read-{DENSITIES[n % 3]}", PICTURE, "What?", f"answer {n}", str(n))
    for n in range(12)
]
NONE = Cell("none", ROWS["none"])
HALF = Cell("divprune", ROWS["divprune"], 0.5)


def measured(cell: Cell, wrong: set[int], nll: float) -> MeasuredCell:
    def record(n: int, text: str | None, lost: float | None) -> SampleRecord:
        return SampleRecord(f"k{n}", ASKED[n].id, kept=0.25, text=text, nll=lost, tokens=2)

    texts = ["no" if n in wrong else f"Answer {n}." for n in range(12)]
    greedy = [record(n, text, None) for n, text in enumerate(texts)]
    return MeasuredCell(cell, cell.left or 1.0, greedy, [record(n, None, nll) for n in range(12)])


def test_figures_of_given_answers() -> None:
    none, half = measured(NONE, {0}, 0.2), measured(HALF, {0, 1, 3, 4}, 1.0)
    assert half.cache == 0.25
    assert figure("exact", none, none, ASKED, "all").value == pytest.approx(11 / 12)
    assert figure("exact", half, none, ASKED, "sparse").value == 2 / 4
    assert figure("exact", half, none, ASKED, "dense").value == 1
    lost = figure("lost", half, none, ASKED, "all")
    assert lost.value == 3 / 12
    assert 0 <= lost.interval[0] < lost.value < lost.interval[1] < 0.6
    assert figure("rouge", half, none, ASKED, "dense").value == 1
    assert figure("rouge", half, none, ASKED, "all").value == pytest.approx(9 / 12)
    perplexity = figure("ppl", half, none, ASKED, "all")
    assert (perplexity.value, *perplexity.interval) == pytest.approx([np.exp(0.5)] * 3)
    beyond = MeasuredCell(Cell("fastv", ROWS["fastv"], 0.11), None, [], [])
    text = tables([none, half, beyond], ASKED)
    assert "| divprune | 50 % | 25 % | 50 (15–85) | 50 (15–85) | 100 (51–100) |" in text  # noqa: RUF001
    assert "Out of reach: fastv at 11 %." in text


def test_wilson_is_the_root_of_its_equation() -> None:
    """At both ends p of the interval, (share - p) squared is z² p (1 - p) / n."""
    for right, count in ((0, 9), (4, 9), (9, 9), (118, 126)):
        for p in wilson(right, count):
            deviation = 1.96 * np.sqrt(max(0.0, p * (1 - p)) / count)
            assert abs(right / count - p) == pytest.approx(deviation, abs=1e-9)


def test_a_bootstrap_covers_what_the_normal_law_says() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = bootstrap(np.stack([values, np.ones(400)], 1), lambda s: s[:, 0] / s[:, 1])
    spread = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - spread, abs=0.15 * spread)
    assert high == pytest.approx(values.mean() + spread, abs=0.15 * spread)


def test_cells_of_rows() -> None:
    made = list(cells(["snapkv", "none", "divprune", "lightvlm + snapkv"], [0.2], [0.5], [0.16]))
    found = [(c.name, c.left, c.kept) for c in made]
    assert found == [
        ("none", None, None),
        ("snapkv", None, 0.5),
        ("divprune", 0.2, None),
        ("lightvlm + snapkv", 0.4, 0.4),
    ]


def test_bundles_have_room_for_every_cell() -> None:
    """All rows are recipes that there are; equal ones share a bundle."""
    from lvlm.export.recipes.recipe import known_recipe, parse_settings

    for row in ROWS.values():
        recipe = parse_settings(known_recipe(row.recipe), row.settings).for_layers(8)
        policy = recipe.cache_policy()
        assert policy is None or policy.budget.keep == 1
        if row.group in ("reductions", "both", "more"):
            assert recipe.parameters()["keep"] == 1
        assert (policy is None) <= (row.group in ("once", "reductions", "more"))
    assert dataclasses.replace(ROWS["interval"], group="reductions") == ROWS["lightvlm"]


def test_the_plot_has_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line in each panel by density, and in that by prefill unless prefill computes all."""
    pytest.importorskip("matplotlib")
    from cost_tables import tables_plot
    from matplotlib.axes import Axes

    cache = Cell("snapkv", ROWS["snapkv"], None, 0.5)
    both = Cell("lightvlm + snapkv", ROWS["lightvlm + snapkv"], 0.4, 0.4)
    rows = [measured(c, {1, 2}, 0.3) for c in (NONE, HALF, cache, both)]
    lines: list[tuple[str, list[float]]] = []
    plot = Axes.plot

    def noted(axes: Axes, x: list[float], y: list[float], *rest: Any, **given: Any) -> Any:
        lines.append((given["label"], list(y)))
        return plot(axes, x, y, *rest, **given)

    monkeypatch.setattr(Axes, "plot", noted)
    tables_plot.draw(tmp_path / "picture.png", rows, ASKED)
    names = [label.partition(": ")[2] for label, _ in lines]
    panels = len(DENSITIES)
    assert names.count("divprune") == names.count("lightvlm + snapkv") == panels + 1
    assert names.count("snapkv") == panels
    assert [y for label, (y,) in lines if label.endswith("divprune")] == [
        *([100.0, 75.0, 75.0]),
        pytest.approx(100 * 10 / 12),
    ]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
