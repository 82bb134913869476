"""The report of lvlm-bench: which ratios it takes, and a run of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Run, one_line

from lvlm.bench import machine
from lvlm.bench.bench_cli import main
from lvlm.bench.case_figures import RequestRecord, Round
from lvlm.bench.rounds import BenchPlan, Result, joined
from lvlm.bench.speed_report import LOAD, LONE, ratio, report
from lvlm.bench.workload import Case

MACHINE = {
    "cpu": "A CPU",
    "cores": 2,
    "read_bytes_per_s": 3e10,
    "packages": {"lvlm-deploy": "1"},
    "python": "3.11",
}
ALONE = Case(32, 1, 5, 1, 1)
FOUR = Case(32, 1, 5, 8, 4)
PLAN = BenchPlan((ALONE, FOUR), warmup=0, repeats=2, seed=0, threads=2, slots=4, apart=False)


def one(first: float, gap: float, peak: float | None = None) -> Round:
    """A round of one answer of five tokens; seconds and megabytes."""
    tokens = tuple(first + gap * i for i in range(5))
    return Round((RequestRecord(0.0, tokens, 608),), None if peak is None else int(peak * 1e6))


def result(label: str, *rounds: Round, peer: bool = False, error: str | None = None) -> Any:
    contender: Any = SimpleNamespace(label=label, note="", peer=object() if peer else None)
    found = Result(contender, error=error)
    found.rounds = {case: list(rounds) for case in (ALONE, FOUR)}
    return found


OURS = result("ours", one(1.0, 0.1, 500), one(2.0, 0.1, 510))
FAST = result("fast", one(0.5, 0.2, 900), one(4.0, 0.2, 900), peer=True)
STEADY = result("steady", one(2.0, 0.05), one(2.0, 0.2), peer=True)


def test_ratios_are_of_the_best_in_each_round() -> None:
    others = [FAST.rounds[ALONE], STEADY.rounds[ALONE]]
    first, decode, peak = (ratio(OURS.rounds[ALONE], others, figure) for figure in LONE)
    assert first is not None
    assert decode is not None
    assert peak is not None
    assert (first.low, first.high) == (1.0, 2.0)  # 1.0 by 0.5, 2.0 by 2.0
    assert (decode.low, decode.high) == (pytest.approx(0.5), pytest.approx(2.0))
    assert (peak.low, peak.high) == (pytest.approx(5 / 9), pytest.approx(51 / 90))
    assert ratio(OURS.rounds[ALONE], [STEADY.rounds[ALONE]], LONE[2]) is None
    tokens = ratio(OURS.rounds[FOUR], others, LOAD[0])
    assert tokens is not None
    assert tokens.high == pytest.approx((5 / 2.4) / (5 / 2.8))


def cells(text: str, label: str) -> list[list[str]]:
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[c.strip() for c in row] for row in rows if row[0].strip() == label]


def test_tables_beside_other_runtimes() -> None:
    text = report([OURS, FAST, STEADY], PLAN, MACHINE)
    alone, alone_ratios, four, four_ratios = cells(text, "ours")
    assert alone[1:] == ["1.50 / 10.0 / 505"]
    assert alone_ratios[1:] == ["1.50 (1.00 to 2.00) / 1.25 (0.50 to 2.00) / 0.56 (0.56 to 0.57)"]
    assert four[1:] == ["2.8 / 1.50 / 100"]
    assert len(cells(text, "fast")) == 2  # no ratios to itself
    assert cells(text, "steady")[0][1:] == ["2.00 / 12.5 / —"]
    assert "| 608 tokens |" in text
    assert "Beside the best of the other runtimes" in text
    assert four_ratios[1].startswith("1.05 (0.93 to 1.17) / ")


def test_tables_of_bundles_alone_and_of_one_that_failed() -> None:
    other = result("other", one(2.0, 0.1, 250), one(4.0, 0.1, 255))
    broken = result("broken", error="broken: it broke")
    text = report([OURS, other, broken], PLAN, MACHINE)
    assert "Beside ours" in text
    told = "2.00 (2.00 to 2.00) / 1.00 (1.00 to 1.00) / 0.50 (0.50 to 0.50)"
    assert cells(text, "other")[1][1:] == [told]
    assert cells(text, "broken")[0][1:] == ["failed"]
    assert cells(text, "broken")[1][1:] == ["— / — / —"]
    assert "- broken: it broke." in text
    assert len(cells(text, "ours")) == 2


def test_results_of_two_plans_are_one() -> None:
    first = result("ours")
    first.rounds = {ALONE: [one(1, 1)]}
    second = result("ours", error="it broke")
    second.rounds = {FOUR: []}
    (both,) = joined([[first], [second]])
    assert set(both.rounds) == {ALONE, FOUR}
    assert both.error == "it broke"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(machine, "read_bandwidth", partial(machine.read_bandwidth, size=1 << 24))
    return Run(capfd, main)


def test_a_run(run: Run, bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder, data = bundle("digits-llava", max_images=2), tmp_path / "out.json"
    code, out, err = run(
        *(folder, "--report", "--prompt-tokens", "24,30", "--concurrency", "1,2", "--requests", 2),
        *("--threads", 1, "--new-tokens", 4, "--warmup", 0, "--repeats", 2, "--json", data),
    )
    assert code == 0, err
    alone, clients = cells(out, folder.name)
    assert (len(alone), len(clients)) == (3, 3)
    assert "| 168 tokens | 174 tokens |" in out
    assert "| 1 | 2 |" in out
    found = json.loads(data.read_text())["results"]
    assert [len(r["rounds"]) for r in found] == [2] * 4
    assert [r["case"]["requests"] for r in found] == [1, 1, 2, 2]


def test_a_bundle_alone_has_no_ratios() -> None:
    text = report([OURS], PLAN, MACHINE)
    assert len(cells(text, "ours")) == 2
    assert "as ratios" not in text


def test_clients_that_would_be_a_lone_request(run: Run, tmp_path: Path) -> None:
    code, _, err = run(tmp_path, "--report", "--requests", 1)
    assert code == 2
    assert "give 2 or more" in one_line(err, "lvlm-bench")


@pytest.mark.parametrize("flag", [("--rate", 2), ("--costs",), ("--plot", "a.png")])
def test_what_a_report_has_no_table_of(run: Run, tmp_path: Path, flag: tuple[Any, ...]) -> None:
    code, _, err = run(tmp_path, "--report", *flag)
    assert code == 2
    assert f"leave {flag[0]} out" in one_line(err, "lvlm-bench")
