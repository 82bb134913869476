"""lvlm-tune as a user meets it: the choice, tables, repetitions, mistakes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, help_of, one_line
from settings import ASSETS, CACHED

from lvlm.bench.rounds import Result
from lvlm.calibration.evaluate import evaluation
from lvlm.calibration.tune import speeds
from lvlm.calibration.tune.candidates import Candidate, candidates
from lvlm.calibration.tune.shelf import ExportedShelf, Making
from lvlm.calibration.tune.tune_cli import main
from lvlm.core.progress import Progress
from lvlm.export import export_cli

FILES = [
    *("records.jsonl", "results.json", "results.md", "results.png"),
    *("settings.json", "speeds.jsonl"),
]
SAMPLES = ("--data", "digits", "--kinds", "list", "--samples", 12, "--max-new-tokens", 32)
LOAD = ("--concurrency", 2, "--prompt-tokens", 24, "--new-tokens", 4, "--threads", 1)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(capfd, main)


@pytest.fixture(scope="module")
def full(bundle: Callable[..., Path]) -> Path:
    return bundle("tiny-llava", max_images=2)


@pytest.fixture(scope="module")
def light(bundle: Callable[..., Path]) -> Path:
    return bundle("tiny-llava", *CACHED["lightvlm (cached)"], max_images=2)


def rows(text: str) -> dict[str, list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells[2:]}


def test_a_choice_and_its_repetition(
    run: Run, full: Path, light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tuned"
    argv = (full, light, *SAMPLES, *LOAD, "--keep", "0.05", "--kv-keep", "0.2", "-o", out)
    code, printed, err = run(*argv, "--max-loss", "99%")
    assert code == 0, err
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert (out / "results.md").read_text() == printed
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "12 of 12 samples" in err
    table = rows(printed)
    label = "lightvlm keep 0.05 + interval kv-keep 0.2"
    assert set(table) == {"none", label}
    found = json.loads((out / "results.json").read_text())
    none, merged = found["trials"]
    assert none["candidate"]["recipe"] == "none"
    assert none["loss"]["samples"] == 12
    assert (
        merged["loss"]["samples"] == 12
        or merged["out"] == f"others promise more ({merged['loss']['samples']} samples)"
    )
    assert none["loss"]["part"] == 0
    assert none["loss"]["quality"] > 0.5
    assert merged["prediction"]["memory"] < none["prediction"]["memory"]
    assert merged["prediction"]["prefill"] < 1
    for trial in (none, merged):
        assert trial["speed"]["tokens_per_s"] > 0
        assert trial["speed"]["ttft_ms"] > 0
    fastest = max((none, merged), key=lambda t: t["speed"]["tokens_per_s"])
    assert found["chosen"] == fastest["label"]
    assert found["command"] in printed
    assert table[found["chosen"]][-1] == "**chosen**"
    assert shlex.split(found["command"])[:2] in (["lvlm-run", str(full)], ["lvlm-run", str(light)])

    before = {name: (out / name).read_bytes() for name in FILES}
    monkeypatch.setattr(evaluation, "BundleRunner", None)
    monkeypatch.setattr(speeds, "measure", None)
    assert run(*argv, "--max-loss", "99%")[0] == 0
    assert {name: (out / name).read_bytes() for name in FILES} == before

    # What was measured serves other limits; the folder says whose results it holds
    code, _, err = run(*argv, "--max-loss", "98%")
    assert code == 2
    assert "differs in max_loss" in one_line(err, "lvlm-tune")
    (out / "settings.json").unlink()
    assert run(*argv, "--ttft", "100s", "--memory", "1GB")[0] == 0
    assert json.loads((out / "results.json").read_text())["chosen"] == "none"  # loses the least
    (out / "settings.json").unlink()
    code, printed, err = run(*argv, "--ttft", "0.001ms", "-q")
    assert (code, printed) == (2, "")
    assert "the earliest first token comes after" in one_line(err, "lvlm-tune")
    assert json.loads((out / "results.json").read_text())["command"] is None


def test_what_is_known_before_any_work(
    run: Run, full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "BundleRunner", None)
    argv = (full, *SAMPLES, "--prompt-tokens", 3, "--ttft", "1s", "-q", "-o", tmp_path / "out")
    code, printed, err = run(*argv)
    assert (code, printed) == (2, "")
    assert "--prompt-tokens 3: the chat template" in one_line(err, "lvlm-tune")


def test_what_could_not_be_measured_is_tried_again(
    run: Run, full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = (full, *SAMPLES, *LOAD, "--ttft", "100s", "-q", "-o", tmp_path / "out")

    def failing(*args: Any) -> list[Result]:
        return [Result(args[0][0], error="no memory")]

    with monkeypatch.context() as patch:
        patch.setattr(speeds, "measure", failing)
        assert run(*argv)[0] == 2
    (trial,) = json.loads((tmp_path / "out/results.json").read_text())["trials"]
    assert trial["speed"]["error"] == "no memory"
    assert run(*argv) == (0, "", "")


def test_samples_that_the_full_model_cannot_answer(run: Run, full: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    entry = {"image": str(ASSETS / "samples/digits-1.png"), "prompt": "What?", "answer": "A cat."}
    data.write_text(json.dumps(entry) + "\n")
    code, printed, err = run(
        *(full, "--data", data, "--max-new-tokens", 2, *LOAD, "--max-loss", "1%", "-q"),
        *("-o", tmp_path / "out"),
    )
    assert (code, printed) == (2, "")
    assert "answers none of the 1 samples" in one_line(err, "lvlm-tune")


def test_the_command_is_one_that_exports(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    making = Making("tiny-llava", "fp32", None, 300, 2, validate=True)
    some = candidates(["hybrid", "snapkv", "interval"], [0.25], [0.5])
    shelf = ExportedShelf(making, tmp_path, some, lenient=True, progress=Progress(0, quiet=True))
    for one in some:
        program, *words = shlex.split(shelf.command(one))
        assert program == "lvlm-export"
        assert export_cli.main([*words, "--dry-run"]) == 0, capfd.readouterr().err
    shown = capfd.readouterr().out
    assert shown.count("tiny-llava") >= len(some)


def test_recipes_that_are_not_for_a_model(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """visionzip asks for scores of a tower that are not read out of Qwen-VL's."""
    model = str(checkpoint("qwen2.5-vl:gqa"))
    making = Making(model, "fp32", None, 64, 1, validate=False)
    some = [Candidate("visionzip", "none", keep=0.5)]
    shelf = ExportedShelf(making, tmp_path, some, lenient=True, progress=Progress(0, quiet=True))
    served = shelf.serve(some)
    assert served.bundles == {}
    assert "take divprune" in served.refused[some[0].bundle]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["FULL", "--data", "digits", "--ttft", "1s"], "give -o"),
        (["FULL", "-o", "OUT", "--ttft", "1s"], "give --data"),
        ([*SAMPLES, "-o", "OUT", "--ttft", "1s"], "give -m MODEL, or bundles"),
        (["FULL", "-m", "tiny-llava", *SAMPLES, "-o", "OUT"], "give -m MODEL, or bundles"),
        (["FULL", *SAMPLES, "-o", "OUT"], "within what limits?"),
        (["FULL", *SAMPLES, "-o", "OUT", "--ttft", "soon"], "write a time"),
        (["FULL", *SAMPLES, "-o", "OUT", "--max-loss", "2"], "write a part"),
        (["FULL", *SAMPLES, "-o", "OUT", "--memory", "much"], "--memory"),
        (["FULL", *SAMPLES, "-o", "OUT", "--ttft", "1s", "--concurrency", "0"], "give 1 or more"),
        (["FULL", *SAMPLES, "-o", "OUT", "--ttft", "1s", "--dtype", "fp16"], "leave it out"),
        (["LIGHT", *SAMPLES, "-o", "OUT", "--ttft", "1s"], "a bundle of recipe none"),
        (["FULL", "FULL", *SAMPLES, "-o", "OUT", "--ttft", "1s"], "leave one out"),
        (["-m", "tiny-llava", "--recipes", "divprun", *SAMPLES, "-o", "OUT", "--ttft", "1s"],
         "did you mean"),
        (["-m", "tiny-llava", "--new-tokens", 2040, *SAMPLES, "-o", "OUT", "--ttft", "1s"],
         "more than --max-text-len 2048"),
        (["nowhere", *SAMPLES, "-o", "OUT", "--ttft", "1s"], "nowhere"),
        (["FULL", "--set", "x.y=1", *SAMPLES, "-o", "OUT", "--ttft", "1s"], "--set is for"),
    ],
)  # fmt: skip
def test_mistakes(
    argv: list[Any], message: str, run: Run, full: Path, light: Path, tmp_path: Path
) -> None:
    places = {"FULL": full, "LIGHT": light, "OUT": tmp_path / "out"}
    code, printed, err = run(*(places.get(word, word) for word in argv))
    assert (code, printed) == (2, "")
    assert message in one_line(err, "lvlm-tune")
    assert not (tmp_path / "out").exists()


def test_help_imports_nothing_heavy() -> None:
    text, imported = help_of("lvlm.calibration.tune.tune_cli")
    assert imported == []
    assert "--max-loss" in text
