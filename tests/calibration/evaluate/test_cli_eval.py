"""lvlm-eval as a user meets it: files, tables, repetitions, mistakes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, help_of, one_line
from PIL import Image
from settings import CACHED

from lvlm.calibration.evaluate import eval_arguments, evaluation, recipe_bundles
from lvlm.calibration.evaluate.eval_cli import main
from lvlm.calibration.evaluate.records import SampleRecord
from lvlm.calibration.evaluate.variant_runner import BundleRunner
from lvlm.core.installing import install
from lvlm.export.export_plan import ExportPlan

FILES = ["records.jsonl", "results.json", "results.md", "results.png", "settings.json"]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(capfd, main)


@pytest.fixture(scope="module")
def full(bundle: Callable[..., Path]) -> Path:
    return bundle("digits-llava", max_images=2)


@pytest.fixture(scope="module")
def light(bundle: Callable[..., Path]) -> Path:
    return bundle("digits-llava", *CACHED["lightvlm (cached)"], max_images=2)


DIGITS = ("--data", "digits", "--kinds", "describe,read", "--samples", 2, "--max-new-tokens", 8)


def table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_results_and_their_repetition(
    run: Run, full: Path, light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results"
    argv = (full, light, *DIGITS, "--keep", "0.1,0.5", "--kv-keep", "0.3", "-o", out)
    code, printed, err = run(*argv)
    assert code == 0, err
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert (out / "results.md").read_text() == printed
    assert "[1/8]" in err  # 4 rows, 2 runs each
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")

    head, _, *rows = table(printed)
    assert head[:7] == [
        *("bundle", "recipe", "setting"),
        *("kept cache", "perplexity", "ROUGE-L", "exact match"),
    ]
    assert head[-2:] == ["prefill ms", "decode ms/token"]
    assert [row[2] for row in rows] == ["full cache", "keep 0.1", "keep 0.5", "kv-keep 0.3"]
    assert rows[0][3] == "100.0%"
    assert rows[0][5] == "1.0000"
    assert set(rows[1][3:]) == {"–"}  # noqa: RUF001
    assert rows[2][3] in ("49.9%", "50.0%", "50.1%")
    assert float(rows[2][4]) > float(rows[0][4])
    assert "keep 0.1: out of reach" in printed

    data = json.loads((out / "results.json").read_text())
    assert [row["setting"] for row in data["rows"]] == [row[2] for row in rows]
    assert data["rows"][0]["values"]["rouge"] == 1
    assert data["rows"][1]["kept"] is None
    assert data["rows"][2]["samples"][0]["forced"]["tokens"] > 40
    assert data["rows"][2]["samples"][1]["greedy"]["text"]
    assert 0 < data["rows"][2]["samples"][0]["greedy"]["keep"] < 1
    used = [sample["forced"]["cache_bytes_used"] for sample in data["rows"][2]["samples"]]
    assert data["rows"][2]["cache_bytes_used"] == sum(used) / 2
    assert data["settings"]["keep"] == [0.1, 0.5]

    before = {name: (out / name).read_bytes() for name in FILES}
    monkeypatch.setattr(evaluation, "BundleRunner", None)
    assert run(*argv)[0] == 0
    assert {name: (out / name).read_bytes() for name in FILES} == before


def test_equal_commands_give_equal_results_but_for_times(
    run: Run, full: Path, light: Path, tmp_path: Path
) -> None:
    made = []
    for name in ("a", "b"):
        code, printed, err = run(
            *(
                full,
                light,
                "--data",
                "digits",
                "--kinds",
                "row,read",
                "--samples",
                3,
                "--keep",
                0.5,
            ),
            *("--max-new-tokens", 4, "--batch", 2, "--no-timings", "-o", tmp_path / name),
        )
        assert code == 0, err
        assert "ms" not in printed.partition("\n\n- ")[0]
        made.append([(tmp_path / name / file).read_bytes() for file in FILES[1:4]])
        assert b"_ms" not in made[-1][0]
    assert made[0] == made[1]


def test_metrics_and_quiet(run: Run, full: Path, light: Path, tmp_path: Path) -> None:
    argv = (light, "--metrics", "accuracy,rouge", "--reference", full, *DIGITS, "-q")
    assert run(*argv, "-o", tmp_path / "out") == (0, "", "")
    head, _, *rows = table((tmp_path / "out/results.md").read_text())
    assert head[4:6] == ["ROUGE-L", "exact match"]
    assert [row[2] for row in rows] == ["as exported"]  # the reference has no row of its own
    assert 0 < float(rows[0][4]) <= 1


def test_data_from_a_file(run: Run, full: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    entry = {"image": "a.png", "question": "What is it?", "answer": "Red."}
    (tmp_path / "mm.json").write_text(json.dumps([entry, entry]))
    code, printed, err = run(
        *(full, "--data", tmp_path / "mm.json", "--format", "mm-vet", "--metrics", "ppl"),
        *("-o", tmp_path / "out"),
    )
    assert code == 0, err
    assert printed.startswith(f"2 samples of {tmp_path / 'mm.json'}")
    assert float(table(printed)[2][4]) > 1


def test_an_interrupted_command_goes_on(
    run: Run, full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = (full, *DIGITS, "--metrics", "accuracy", "-o", tmp_path / "out")
    batches = []
    original = BundleRunner.run

    def once(runner: BundleRunner, *args: Any) -> list[SampleRecord]:
        batches.append(args)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return original(runner, *args)

    monkeypatch.setattr(BundleRunner, "run", once)
    code, printed, err = run(*argv)
    assert (code, printed) == (130, "")
    assert "the same command goes on from here" in err
    assert not (tmp_path / "out/results.md").exists()
    assert run(*argv)[0] == 0
    assert len(batches) == 3  # of two samples, the second one twice


def test_a_folder_of_another_command(
    run: Run, full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    argv = (full, "--data", "digits", "--kinds", "read", "--metrics", "accuracy", "-o", out)
    assert run(*argv, "--samples", 2, "--max-new-tokens", 2)[0] == 0
    longer = (*argv, "--samples", 3, "--max-new-tokens", 2)
    code, _, err = run(*longer)
    assert code == 2
    assert "differs in data, samples)" in one_line(err, "lvlm-eval")
    assert f"remove {out / 'settings.json'}" in err
    (out / "settings.json").unlink()
    computed: list[Any] = []
    original = BundleRunner.run

    def counted(runner: BundleRunner, *args: Any) -> list[SampleRecord]:
        computed.append(args)
        return original(runner, *args)

    monkeypatch.setattr(BundleRunner, "run", counted)
    assert run(*longer)[0] == 0
    assert len(computed) == 1  # two of three samples were there
    (out / "settings.json").write_text("[")
    assert "is damaged; remove it" in one_line(run(*argv)[2], "lvlm-eval")
    (out / "mine.txt").touch()
    (out / "settings.json").unlink()
    assert "holds other files" in one_line(run(*argv)[2], "lvlm-eval")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["FULL", "--data", "digits"], "give -o"),
        (["FULL", "-o", "OUT"], "give --data"),
        (["--data", "digits", "-o", "OUT"], "what to evaluate"),
        (["--recipes", "none", *DIGITS, "-o", "OUT"], "add -m MODEL"),
        (["-m", "tiny-llava", *DIGITS, "-o", "OUT"], "add --recipes"),
        (["FULL", "--set", "keep=1", *DIGITS, "-o", "OUT"], "--set is for bundles made from"),
        (["FULL", "--no-validate", *DIGITS, "-o", "OUT"], "--no-validate is for bundles"),
        (["FULL", "--metrics", "rogue", *DIGITS, "-o", "OUT"], "did you mean rouge"),
        (["FULL", "--metrics", "ppl,,rouge", *DIGITS, "-o", "OUT"], "empty name"),
        (["FULL", "--metrics", "ppl", *DIGITS, "-o", "OUT"], "--max-new-tokens has no effect"),
        (
            ["FULL", "--metrics", "ppl", "--reference", "FULL", "--data", "digits", "-o", "OUT"],
            "--reference has no effect",
        ),
        (["FULL", "--data", "digit", "-o", "OUT"], "did you mean digits"),
        (["FULL", "--data", "digits", "--kinds", "row,rea", "-o", "OUT"], "did you mean read"),
        (["FULL", "--data", "no.jsonl", "-o", "OUT"], "no such file"),
        (["FULL", *DIGITS, "--keep", "0", "-o", "OUT"], "0.0 is not above 0 and up to 1"),
        (["FULL", *DIGITS, "--keep", "0.5,nan", "-o", "OUT"], "nan is not above 0"),
        (["FULL", *DIGITS, "--kv-keep", "1.5", "-o", "OUT"], "1.5 is not above 0"),
        (["FULL", *DIGITS, "--keep", "half", "-o", "OUT"], "is not a list like"),
        (["FULL", *DIGITS, "--keep", "0.5", "-o", "OUT"], "keeps the full cache"),
        (["FULL", *DIGITS, "--kv-keep", "0.5", "-o", "OUT"], "merge tokens and also compress"),
        (["FULL", *DIGITS, "--batch", "0", "-o", "OUT"], "--batch is 0"),
        (["FULL", *DIGITS, "--device", "cpuu", "-o", "OUT"], "did you mean cpu"),
        (["FULL", *DIGITS, "-o", "OUT/deep/er"], "does not exist; make it"),
        (["LIGHT", *DIGITS, "-o", "OUT"], "rouge compares with the full cache; add none"),
        (["LIGHT", "--reference", "LIGHT", *DIGITS, "-o", "OUT"], "does not keep the full cache"),
        (["EMPTY", *DIGITS, "-o", "OUT"], "is not a bundle"),
        (
            ["-m", "tiny-llava", "--recipes", "none,lightvml", *DIGITS, "-o", "OUT"],
            "did you mean lightvlm",
        ),
        (["-m", "tiny-lava", "--recipes", "none", *DIGITS, "-o", "OUT"], "did you mean tiny-llava"),
        (
            [*("-m", "tiny-llava", "--recipes", "none", "--set", "x=1"), *DIGITS, "-o", "OUT"],
            "none of the recipes has parameters",
        ),
    ],
)
def test_mistakes_get_one_line_and_status_2(
    run: Run, full: Path, light: Path, tmp_path: Path, argv: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    known = {"FULL": full, "LIGHT": light, "EMPTY": tmp_path / "empty"}
    given = [known.get(str(a), str(a).replace("OUT", str(tmp_path / "out"))) for a in argv]
    code, printed, err = run(*given)
    assert (code, printed) == (2, "")
    assert message in one_line(err, "lvlm-eval")
    assert not (tmp_path / "out/results.md").exists()


def test_missing_packages_get_one_line(
    run: Run, full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rouge_score" else real(name)
    )
    code, _, err = run(full, *DIGITS, "-o", tmp_path / "out")
    assert code == 2
    assert f"rouge_score not installed; {install('calibration')}" in one_line(err, "lvlm-eval")
    argv = ("-m", "tiny-llava", "--recipes", "nope", *DIGITS, "-o", tmp_path / "out")
    assert "unknown recipe" in one_line(run(*argv)[2], "lvlm-eval")


# Bundles made from recipes


def test_bundles_are_made_once(
    run: Run, full: Path, light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[ExportPlan] = []

    def export(plan: ExportPlan, _: object) -> None:
        exported.append(plan)
        shutil.copytree(full if plan.recipe.name == "none" else light, plan.options.output)

    monkeypatch.setattr(recipe_bundles, "export", export)
    argv = (
        *("-m", "tiny-llava", "--recipes", "none,lightvlm", "--set", "lightvlm.kv_floor=16"),
        *("--data", "digits", "--samples", 1, "--metrics", "accuracy", "--max-new-tokens", 2),
        *("--dtype", "fp32", "--keep", 0.5, "-o", tmp_path / "out"),
    )
    code, printed, err = run(*argv)
    assert code == 0, err
    assert [row[:3] for row in table(printed)[2:]] == [
        ["none", "none", "full cache"],
        ["lightvlm", "lightvlm", "keep 0.5"],
    ]
    options = exported[1].options
    assert options.validate
    assert (options.max_images, options.max_text_len, options.dtype) == (1, 2048, "fp32")
    parameters = options.recipe.parameters()
    assert (parameters["keep"], parameters["kv_keep"], parameters["kv_floor"]) == (1.0, 1.0, 16)
    assert run(*argv)[1] == printed
    assert len(exported) == 2


def test_help_imports_nothing_heavy() -> None:
    text, imported = help_of("lvlm.calibration.evaluate.eval_cli")
    assert "--recipes" in text
    assert not imported


def test_data_sets_are_listed(run: Run) -> None:
    code, printed, _ = run("--list-data")
    assert code == 0
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        *("digits", "jsonl", "llava-detail", "mm-vet", "text")
    ]


def test_defaults_in_help_are_those_of_the_code() -> None:
    from lvlm.calibration.evaluate.answer_metrics import METRICS
    from lvlm.calibration.evaluate.variant_runner import Conditions

    assert eval_arguments.METRICS.split(",") == list(METRICS)
    assert Conditions().max_new_tokens == eval_arguments.MAX_NEW_TOKENS
