"""lvlm-export: mistakes and machines that are too small, each one line and status 2."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run

from lvlm.export import estimates, exporter, machine_check
from lvlm.export.export_cli import main

NAME = "llava:llama-mha-bias-rope3-siglip"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(capfd, main)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-m", "tiny-lava"], "did you mean tiny-llava"),
        (["-m", "CHECKPOINT", "-r", "lightvml"], "did you mean lightvlm"),
        (["-m", "CHECKPOINT", "-r", "lightvlm", "--set", "kep=1"], "did you mean keep"),
        (["-m", "CHECKPOINT", "-r", "lightvlm", "--set", "keep=2"], "keep is 2"),
        (["-m", "CHECKPOINT", "-r", "elastic-cache", "--set", "kv_keep=0"], "kv_keep is 0"),
        (["-m", "CHECKPOINT", "-r", "uniform", "--set", "kv_cap=1"], "integer of 2 or more"),
        (["-m", "CHECKPOINT", "-r", "prefixkv", "--set", "profile=no.json"], "does not exist"),
        (["-m", "CHECKPOINT", "-r", "prefixkv", "--set", "samples=no.jsonl"], "do not exist"),
        (["-m", "CHECKPOINT", "--target", "trt-rtxx"], "did you mean trt-rtx"),
        (["-m", "CHECKPOINT", "--max-text-len", "0"], "--max-text-len is 0"),
        (["-m", "CHECKPOINT", "--max-text-len", "1000000000"], "give 2048 or less"),
        (["-m", "CHECKPOINT", "--max-text-len", "2049", "--dry-run"], "made for 2,048 tokens"),
        (["-m", "CHECKPOINT", "--max-images", "1000000000", "--dry-run"], "has room for"),
        (["-m", "BUNDLE"], "is a bundle, exported already; give the checkpoint"),
        (["-m", "CHECKPOINT", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["-m", "EMPTY"], "has no config.json"),
        ([], "which model"),
    ],
)
def test_mistakes_get_one_line_and_status_2(
    argv: list[str],
    message: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    run: Run,
) -> None:
    places = {name: tmp_path / name.lower() for name in ("EMPTY", "BUNDLE")}
    for place in places.values():
        place.mkdir()
    (places["BUNDLE"] / "lvlm.json").touch()
    known = {"CHECKPOINT": str(checkpoint(NAME)), **{k: str(v) for k, v in places.items()}}
    out = tmp_path / "out"
    run.capfd.readouterr()  # what saving the checkpoint says
    code, _, err = run(*(known.get(a, a) for a in argv), "-o", out)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1 or "usage:" in err
    assert not out.exists()


def test_output_that_is_in_the_way(
    checkpoint: Callable[[str], Path], tmp_path: Path, run: Run
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    code, _, err = run("-m", checkpoint(NAME), "-o", tmp_path)
    assert code == 2
    assert "exists and is not empty" in err
    code, _, err = run("-m", checkpoint(NAME), "-o", tmp_path / "a/b")
    assert code == 2
    assert "does not exist" in err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before weights are fetched. Root may write anywhere, so the answer is set."""
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode == os.W_OK))
    code, _, err = run("-m", "who/absent", "-o", tmp_path / "out")
    assert code == 2
    assert f"the folder {tmp_path} cannot be written to" in err


def test_disk_too_small(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        machine_check.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1)
    )
    code, _, err = run("-m", checkpoint(NAME), "-o", tmp_path / "out")
    assert code == 2
    assert "the disk has 1 B free" in err


@pytest.mark.parametrize(
    ("free", "message"),
    [(700_000_000, "or give --no-validate (about "), (10_000_000, "a machine with more memory\n")],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_memory_too_small(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    message: str,
    dry: tuple[str, ...],
) -> None:
    """Said before any work."""
    monkeypatch.setattr(estimates, "free_memory", lambda: free)
    monkeypatch.setattr(
        estimates, "peak_memory", lambda *_, validate, **__: 600_000_000 + validate * 10**9
    )
    monkeypatch.setattr(exporter, "write_bundle", None)
    code, _, err = run("-m", checkpoint(NAME), "-o", tmp_path / "out", *dry)
    assert code == 2
    assert "the export needs about 1.6 GB of memory" in err
    assert message in err
