"""lvlm-calibrate as a user meets it: a profile and its plot, resuming, mistakes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import help_of
from PIL import Image
from settings import ASSETS

from lvlm.calibration.profile import measure
from lvlm.calibration.profile.calibrate_cli import main
from lvlm.core.installing import install
from lvlm.core.progress import Progress, Stage, duration
from lvlm.export import estimates
from lvlm.export.budgets import importance_recording, measuring
from lvlm.export.budgets.prefix_profiles import check_profile, model_hash, read_profile
from lvlm.export.checkpoint.checkpoint import Checkpoint
from lvlm.main import main as lvlm_main

MODEL = ASSETS / "digits-llava"


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three samples in a folder of their own."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in (1, 2):
        shutil.copy(ASSETS / f"samples/digits-{i}.png", folder)
    lines = [
        {"image": "digits-1.png", "prompt": "Describe the picture."},
        {"image": ["digits-1.png", "digits-2.png"], "prompt": "Read the top row."},
        {"image": [], "prompt": "How often does 7 appear?"},
    ]
    path = folder / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_calibrate_three_samples(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "profile.json"
    code, text, err = run(
        capsys, "-m", MODEL, "--data", data, "--keep", "0.3", "-o", out, "--samples", 3
    )
    assert code == 0, err
    assert text == ""
    assert "[3/4] measure importances  3 samples" in err
    assert f"next: lvlm-export -m {MODEL} -r prefixkv --set profile={out}" in err
    profile = read_profile(out)
    check_profile(profile, 6, model_hash(Checkpoint(MODEL, "", None)))
    assert profile.model.source == "digits-llava"
    assert (profile.keep, profile.data.samples, profile.recipe.name) == (0.3, 3, "none")
    assert len(profile.rows) == 19
    assert max(profile.row().fractions) - min(profile.row().fractions) > 0.02
    with Image.open(tmp_path / "profile.png") as image:
        assert image.format == "PNG"
        assert len(set(image.convert("RGB").getdata())) > 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "profile.json", "profile.png"]


def test_json_and_merging(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merging = ("-m", "tiny-llava", "--samples", 2, "--recipe", "lightvlm", "--set", "keep=0.1")
    code, _, err = run(capsys, *merging, "-o", tmp_path / "table.json")
    assert code == 0, err
    assert "-r lightvlm --set keep=0.1 --set kv=prefixkv --set kv_profile=" in err
    out = tmp_path / "p.json"
    code, text, err = run(capsys, *merging, "--seed", 1, "-o", out, "--json")
    assert code == 0, err
    assert err == ""
    found = json.loads(text)
    profile = read_profile(out)
    assert found["fractions"] == list(profile.row().fractions)
    assert found["samples"] == 2
    assert Path(found["plot"]).is_file()
    assert found["recipe"]["name"] == profile.recipe.name == "lightvlm"
    assert profile.recipe.parameters["keep"] == 0.1
    assert profile.recipe.parameters["stages"] == [1, 2, 4]


def test_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hashes = []
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(hashes)}.json"
        argv = ("-m", MODEL, "--data", "digits", "--samples", 2, "--seed", seed, "-o", out, "-q")
        assert run(capsys, *argv) == (0, "", "")
        hashes.append(read_profile(out).data.sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_same_command_goes_on_after_an_interrupt(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []

    def record(reference: Any, prompt: Any) -> Any:
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(len(prompt.ids))
        return importance_recording.record_importances(reference, prompt)

    whole = tmp_path / "whole.json"
    assert run(capsys, "-m", MODEL, "--data", data, "-o", whole, "-q")[0] == 0
    out = tmp_path / "p.json"
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "record_importances", record)
        code, _, err = run(capsys, "-m", MODEL, "--data", data, "-o", out)
    assert code == 130
    assert "the same command goes on from here" in err
    assert (tmp_path / "p.json.partial.jsonl").exists()
    assert not out.exists()
    read.clear()
    monkeypatch.setattr(measuring, "record_importances", record)
    code, _, err = run(capsys, "-m", MODEL, "--data", data, "-o", out)
    assert code == 0, err
    assert len(read) == 1
    assert "3 samples, 2 from an earlier run" in err
    assert out.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "p.json.partial.jsonl").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-m", None], "which model? give -m"),
        (["-o", None], "where to? give -o FILE.json"),
        (["-m", "tiny-lava"], "did you mean tiny-llava"),
        (["-m", "FOLDER"], "has no config.json"),
        (["-o", "FOLDER/p.txt"], "name a file ending in .json"),
        (["-o", "FOLDER/none/p.json"], "none does not exist; make it first"),
        (["-o", "FOLDER/there.json"], "there.json exists; give another -o or remove it"),
        (["-o", "FOLDER/drawn.json"], "drawn.png exists"),
        (["--keep", "0"], "keep is 0.0; give a number above 0 and up to 1"),
        (["--keep", "1.5"], "keep is 1.5"),
        (["--keep", "nan"], "keep is nan"),
        (["--keep", "much"], "invalid float value: 'much'"),
        (["--samples", "0"], "0 samples are asked for; give 1 to 8, as there are built in"),
        (["--samples", "9"], "9 samples are asked for; give 1 to 8, as there are built in"),
        (["--data", "digits", "--samples", "0"], "0 samples are asked for; give 1 or more"),
        (["--data", "FOLDER/one.jsonl", "--samples", "2"], "give 1 to 1, as FOLDER/one.jsonl"),
        (["--data", "FOLDER/none.jsonl"], "none.jsonl do not exist"),
        (["--data", "FOLDER"], "are not a file"),
        (["--data", "FOLDER/empty.jsonl"], "empty.jsonl holds no samples"),
        (["--data", "FOLDER/bad.jsonl"], "bad.jsonl:2: not JSON"),
        (["--data", "FOLDER/lacks.jsonl"], 'lacks.jsonl:1: "prompt" is missing'),
        (["--data", "FOLDER/nowhere.jsonl"], "nowhere.jsonl:1: the image FOLDER/cat.png does"),
        (["--data", "FOLDER/junk.jsonl"], "junk.jsonl:1: image 'FOLDER/bad.jsonl' is not an"),
        (["--data", "FOLDER/places.jsonl"], "places.jsonl:1: the prompt has 2 image placeholders"),
        (["--seed", "3"], "--seed has no effect"),
        (["--seed", "-3", "--samples", "2"], "--seed is -3; give 0 or more"),
        (["-r", "lightvml"], "did you mean lightvlm"),
        (["-r", "lightvlm", "--set", "kep=1"], "did you mean keep"),
        (["-r", "uniform"], "recipe 'uniform' merges no tokens"),
        (["--bogus"], "unknown argument --bogus"),
    ],
)
def test_mistakes_get_one_line_and_status_2_before_the_model_is_loaded(
    argv: list[str | None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(measure, "load_fp32", refuse)
    files = {
        "there.json": "{}",
        "drawn.png": "",
        "empty.jsonl": "",
        "one.jsonl": '{"image": [], "prompt": "Hi"}',
        "bad.jsonl": '{"image": [], "prompt": "Hi"}\n{"image"',
        "lacks.jsonl": '{"image": []}',
        "nowhere.jsonl": '{"image": "cat.png", "prompt": "Hi"}',
        "junk.jsonl": '{"image": "bad.jsonl", "prompt": "Hi"}',
        "places.jsonl": '{"image": [], "prompt": "<image><image>"}',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    flags: dict[str, str | None] = {"-m": str(MODEL), "-o": str(tmp_path / "p.json")}
    given = [a and a.replace("FOLDER", str(tmp_path)) for a in argv]
    for name in ("-m", "-o"):
        if name in given:
            place = given.index(name)
            flags[name] = given[place + 1]
            del given[place : place + 2]
    flat = [x for name, value in flags.items() if value for x in (name, value)]
    code, out, err = run(capsys, *flat, *given)
    assert code == 2, err
    assert out == ""
    message = message.replace("FOLDER", str(tmp_path))
    (line,) = (x for x in err.splitlines() if not x.startswith("["))
    assert line.startswith("lvlm-calibrate: error: ")
    assert message in line
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)


@pytest.mark.parametrize(("package", "needed"), [("matplotlib", False), ("sklearn", True)])
def test_a_missing_package_is_named_with_its_extra(
    package: str,
    needed: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``needed``: for the digits only."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )
    argv = ["-m", MODEL, "-o", tmp_path / "p.json", *(["--data", "digits"] if needed else [])]
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert err == (f"lvlm-calibrate: error: {package} not installed; {install('calibration')}\n")


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the answer is set."""
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode == os.W_OK))
    code, _, err = run(capsys, "-m", MODEL, "-o", tmp_path / "p.json")
    assert (code, "cannot be written to" in err) == (2, True)


def test_memory_too_small(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "free_memory", lambda: 1000)
    monkeypatch.setattr(measure, "load_fp32", None)
    code, _, err = run(capsys, "-m", "tiny-llava", "--data", data, "-o", tmp_path / "p.json")
    assert code == 2
    assert "measuring needs about 1.6 GB of memory" in err
    assert "a machine with more memory" in err


def test_a_prompt_longer_than_the_attention_window(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = measure.plan

    def narrow(*args: Any) -> Any:
        job = plan(*args)
        return dataclasses.replace(job, longest=200)

    monkeypatch.setattr(measure, "plan", narrow)
    code, _, err = run(capsys, "-m", MODEL, "--data", data, "-o", tmp_path / "p.json", "-q")
    assert code == 2
    assert "samples.jsonl:2: 298 tokens" in err
    assert "attends over 200 only" in err


def test_verb_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert lvlm_main(["--help"]) == 0
    assert "calibrate  measure how much of its cache each layer needs" in capsys.readouterr().out
    assert lvlm_main(["calibrate", "-o", "x.json"]) == 2
    assert "which model?" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    text, imported = help_of("lvlm.calibration.profile.calibrate_cli")
    assert "--keep" in text
    assert not imported


def test_progress_tells_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that an earlier run had finished do not count as fast ones."""
    from lvlm.core import progress

    now = [100.0]
    shown: list[str] = []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stage = Stage(Progress(1, quiet=True), "x")
    monkeypatch.setattr(stage, "show", shown.append)
    stage.add_item(10, 40, skipped=10)
    now[0] += 20
    stage.add_item(11, 40, skipped=10)
    now[0] += 20
    stage.add_item(12, 40, skipped=10)
    assert shown == ["11 of 40, about 9 min 40 s left", "12 of 40, about 9 min 20 s left"]
    assert [duration(s) for s in (0.4, 59.6, 3599, 7500)] == [
        "0 s", "1 min 00 s", "59 min 59 s", "2 h 05 min",
    ]  # fmt: skip
