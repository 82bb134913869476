"""scripts/gpu_check.py as far as it goes without a GPU, and how it compares."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plugin_library import Built

from lvlm.export.ops.op import OpSample
from lvlm.plugins_trt.plugins.registry import plugins

SCRIPTS = Path(__file__).parents[2] / "scripts"


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPTS / "gpu_check.sh"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )


def test_a_session_without_a_gpu(built: Built, tmp_path: Path) -> None:
    """All steps of gpu_session.sh as far as they go: launches noted down, recipes interpreted."""
    done = subprocess.run(
        [
            *("bash", str(SCRIPTS / "gpu_session.sh"), str(tmp_path / "out"), "--dry-run"),
            *("--build", str(built.library.parent)),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    logs = {file.stem: file.read_text() for file in (tmp_path / "out").iterdir()}
    steps = ["machine", "samples", "times", "recipes"]
    if shutil.which("compute-sanitizer"):
        steps.append("sanitizer")
    else:
        assert "compute-sanitizer is not installed" in logs["session"]
    assert sorted(logs) == sorted([*steps, "session"])
    assert logs["session"].count("status 0") == len(steps)
    for name in ("samples", "times"):
        assert "nothing ran on a GPU" in logs[name]
        named = tuple(f"| {plugin} |" for plugin in plugins())
        rows = [row for row in logs[name].splitlines() if row.startswith(named)]
        assert {row.split(" | ")[0].removeprefix("| ") for row in rows} == set(plugins())
        assert all("not run" in row for row in rows)
    checked = logs["recipes"].partition("## Prefill")[0]
    (row,) = [r.split(" | ") for r in checked.splitlines() if r.startswith("| light")]
    _, difference, same = row
    assert float(difference) < 1e-5
    assert same == "2 of 2 |"
    assert "failed" not in logs["recipes"]


@pytest.mark.slow
def test_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = gpu_check()
    assert done.returncode == 2
    assert "torch sees no GPU; --dry-run goes up to the launches" in done.stderr


def test_every_op_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gpu_cases

    assert set(gpu_cases.MAKERS) == set(plugins())


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gpu_compare

    gpu_compare.FAILED.clear()
    yield gpu_compare
    gpu_compare.FAILED.clear()


def test_what_counts_as_wrong(compare: Any) -> None:
    scores = torch.tensor([[0.5, 0.25, float("nan"), 0.75]])
    states = torch.arange(4 * 32.0).reshape(1, 1, 4, 32)
    counts = torch.tensor([3]), torch.tensor([2]), torch.arange(2)
    sample = OpSample("x", (states, states, scores, *counts), {"mode": "evict"})

    def result(**changes: torch.Tensor) -> tuple[float, list[str]]:
        key, value, index, kept = compare.OPS["CacheCompact"].reference(
            *sample.inputs, **sample.attributes
        )
        outputs = {"key": key, "value": value, "index": index, "kept": kept} | changes
        compare.FAILED.clear()
        found = compare.difference("x", "CacheCompact", sample, list(outputs.values()))
        return found, list(compare.FAILED)

    right = compare.OPS["CacheCompact"].reference(*sample.inputs, **sample.attributes)
    assert result() == (0.0, [])
    largest = float(right[0].abs().max())
    assert result(key=right[0] + largest / 4) == (pytest.approx(0.25), [])
    assert result(index=right[2] + 1)[1] == ["x: 2 of 2 differ in kept_index"]
    wild = right[1].clone()
    wild[..., 0] = float("inf")
    assert result(value=wild)[1] == ["x: compact_value is not finite at other places"]
