"""The campaign of generated inputs and kills: a short one of fixed seeds, and what it notices."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from campaign import children, judge
from campaign.case import Base, Case
from campaign.judge import Outcome
from lvlm.core.errors import ParameterError
from lvlm.export.budgets.calibration_samples import read_samples

TESTS = Path(__file__).parents[1]
BASE = Base(Path("bundle"), Path("checkpoint"), ())


def test_what_is_slow_once_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "SECONDS", 1)
    monkeypatch.setattr(children, "GRACE", 1)
    seen = tmp_path / "seen"

    def slow_once() -> None:
        if not seen.exists():
            seen.touch()
            time.sleep(60)

    generator = SimpleNamespace(make=lambda *_: Case("call", call=slow_once))
    results = list(children.run("x", generator, range(3), 1, BASE, tmp_path))
    assert [(r.number, r.faults) for r in results] == [(0, ()), (1, ()), (2, ())]


@pytest.mark.slow
def test_a_short_campaign_finds_nothing(pytestconfig: pytest.Config) -> None:
    """In a normal run without what imports torch, most of whose time is that."""
    whole = pytestconfig.getoption("--whole")
    some = ["--inputs", "24", "--kills", "0", "--only", "manifests,images,prompts,templates"]
    count = ["--inputs", "2000", "--kills", "40"] if whole else some
    done = subprocess.run(
        [sys.executable, "-m", "campaign", *count, "--seed", "14"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS), *sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| all |" in done.stdout


def _raise() -> None:
    raise KeyError("x")


def _crash() -> None:
    faulthandler.disable()  # pytest's own would tell all of it
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (_raise, "traceback"),
        (lambda: os._exit(3), "ended with 3"),
        (_crash, "ended by signal 11"),
        (lambda: time.sleep(60), "hang"),
        (lambda: bytearray(64 << 20).count(1), "memory"),
        (lambda: Path("out/.x.partial-1").touch(), "left .x.partial-1"),
        (lambda: sys.exit(2), "refused without a cause"),
        (lambda: sys.exit(5), "status 5"),
        (lambda: None, None),
    ],
)
def test_what_a_process_notices(
    call: Callable[[], object], fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "SECONDS", 1)
    monkeypatch.setattr(children, "GRACE", 1)
    if fault == "memory":
        monkeypatch.setattr(judge, "MEMORY", 1 << 20)
    else:
        monkeypatch.setattr(judge, "MEMORY", 1 << 40)
    generator = SimpleNamespace(make=lambda *_: Case("call", call=call))
    fine = SimpleNamespace(make=lambda *_: Case("call", call=lambda: None))
    results = list(children.run("x", generator, [4], 1, BASE, tmp_path))
    assert [r.number for r in results] == [4]
    assert (fault in results[0].faults) if fault else not results[0].faults
    assert [r.number for r in children.run("x", fine, range(3), 1, BASE, tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("case", "outcome", "fault"),
    [
        (Case("lvlm-run"), Outcome(1, "", "lvlm-run: error: x", 0, 0), "status 1"),
        (Case("lvlm-run"), Outcome(2, "", "lvlm-run: error: x\n1\n2\n3\n", 0, 0), "4 lines"),
        (Case("lvlm-run"), Outcome(2, "", "thread panicked at x error: y", 0, 0), "traceback"),
        (Case("lvlm-run"), Outcome(0, "", "", 31, 0), "hang"),
        (Case("lvlm-run", refused=True), Outcome(0, "", "", 0, 0), "damage accepted"),
        (Case("lvlm-run", refused=True), Outcome(2, "", "lvlm-run: error: x", 0, 0), None),
        (Case("lvlm-run"), Outcome(2, "✗ x", "", 0, 0), "refused without a cause"),
        (Case("lvlm-doctor"), Outcome(2, "✗ x", "", 0, 0), None),
        (Case("lvlm-doctor"), Outcome(2, "✓ x", "", 0, 0), "refused without a cause"),
    ],
)
def test_what_the_judge_notices(
    case: Case, outcome: Outcome, fault: str | None, tmp_path: Path
) -> None:
    assert judge.faults(case, outcome, tmp_path) == ([fault] if fault else [])


def test_half_a_bundle_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "out/bundle").mkdir(parents=True)
    case = Case("lvlm-export", output=tmp_path / "out/bundle")
    (found,) = judge.leftovers(case, tmp_path)
    assert found.startswith("half-written")


def test_samples_that_never_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ParameterError, match="not a file"):
            read_samples(path)
