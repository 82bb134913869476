"""lvlm-export as a user meets it: results, mistakes, nothing half-written."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import FAMILIES
from settings import ASSETS

from lvlm.core.errors import ValidationError
from lvlm.export import estimates, exporter, machine
from lvlm.export.budgets.prefix_profiles import (
    DataId,
    LayerSpread,
    ModelId,
    Profile,
    RecipeId,
    model_hash,
)
from lvlm.export.export_cli import main
from lvlm.export.verify import forms, validation
from lvlm.export.verify.checks import Check, table
from lvlm.export.verify.outcome import Outcome
from lvlm.export.weights.weights_file import WEIGHTS, WeightsFile
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.policies.shares import ProfileRow

NAME = "llava:llama-mha-bias-rope3-siglip"


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_export_validates_and_reports(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also what was not run."""
    monkeypatch.setattr(forms, "LARGE", 0)
    code, _, err = run(
        capsys,
        "-m",
        checkpoint(NAME),
        "-r",
        "lightvlm",
        "--set",
        "keep=0.2",
        "--target",
        "openvino",
        "-o",
        tmp_path / "out",
    )
    assert code == 0, err
    assert "[8/8]" in err
    line = (
        r"note: not run: vision\.openvino\.onnx, prefill\.openvino\.onnx, .*: "
        "(OpenVINO would copy the weights|openvino is not installed)"
    )
    assert re.search(line, " ".join(err.split()))
    assert "✓ vision.onnx" in err
    assert "✗" not in err
    manifest = read_bundle(tmp_path / "out")
    assert manifest.validation == "passed"
    assert manifest.parameters["keep"] == 0.2
    parts = ("-m", checkpoint(NAME), "-r", "lightvlm", "-o", tmp_path / "other", "--dry-run")
    parts += ("--target", "openvino")
    foretold = json.loads(run(capsys, *parts, "--json")[1])["files"]
    assert foretold == sorted(path.name for path in (tmp_path / "out").iterdir())
    recorded = json.loads((tmp_path / "out/validation.json").read_text())
    assert {c["name"].split()[0] for c in recorded["checks"]} >= {"vision.onnx", "prefill.onnx"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_bf16_and_plugins_are_checked_on_what_is_put_into_the_graphs(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(
        capsys, "-m", checkpoint(NAME), "-r", "lightvlm", "--dtype", "bf16", "-o", tmp_path / "out",
        "--target", "trt-11",
    )  # fmt: skip
    assert code == 0, err
    manifest = read_bundle(tmp_path / "out")
    assert manifest.dtype == "bfloat16"
    assert manifest.validation == "passed, widened to fp32"
    files = json.loads((tmp_path / "out/validation.json").read_text())["files"]
    assert files["decode.onnx"] == "run, bf16 widened to fp32"
    how = "run, bf16 widened to fp32, the lvlm ops' functions put back"
    assert files["prefill.trt-11.onnx"] == files["compact.trt-11.onnx"] == how
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_dry_run_writes_nothing_and_says_what(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, text, _ = run(capsys, "-m", checkpoint(NAME), "-o", out, "--dry-run", "--json")
    assert code == 0
    data = json.loads(text)
    assert data["image_tokens_per_layer"] == [25, 25]
    assert data["capacity"]["per_layer"] == [2048 + 25] * 2
    assert data["peak_memory_estimate_bytes"] > data["weight_bytes"] > 0
    assert not out.exists()


def test_a_failed_check_leaves_no_bundle(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weights are disturbed on their way into the bundle: the comparison must notice."""
    write = WeightsFile.write

    def disturbed(weights: WeightsFile, folder: Path, *args: Any) -> object:
        file = write(weights, folder, *args)
        path = folder / WEIGHTS
        data = bytearray(path.read_bytes())
        data[: len(data) // 4] = bytes(len(data) // 4)
        path.write_bytes(data)
        return file

    monkeypatch.setattr(WeightsFile, "write", disturbed)
    code, _, err = run(capsys, "-m", checkpoint(NAME), "-o", tmp_path / "out")
    assert code == 2
    assert "✗" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_interrupted_export_leaves_nothing_and_stale_folders_go(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = tmp_path / ".out.partial-999999999"
    stale.mkdir()
    (stale / "weights.bin").write_text("x")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "_trace_all", interrupt)
    assert main(["-m", str(checkpoint(NAME)), "-o", str(tmp_path / "out"), "-q"]) == 130
    assert list(tmp_path.iterdir()) == []


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
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {name: tmp_path / name.lower() for name in ("EMPTY", "BUNDLE")}
    for place in places.values():
        place.mkdir()
    (places["BUNDLE"] / "lvlm.json").touch()
    known = {"CHECKPOINT": str(checkpoint(NAME)), **{k: str(v) for k, v in places.items()}}
    out = tmp_path / "out"
    capsys.readouterr()  # what saving the checkpoint says
    code, _, err = run(capsys, *(known.get(a, a) for a in argv), "-o", out)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1 or "usage:" in err
    assert not out.exists()


def profile(folder: Path, layers: int) -> Profile:
    row = ProfileRow(0.5, tuple([0.4, 0.6] * (layers // 2)))
    spread = LayerSpread((0.0,) * layers, (row.fractions,))
    model = ModelId("a", "b", model_hash(folder))
    data, recipe = DataId("", 1), RecipeId("none", {})
    return Profile("prefixkv", 1, 0.5, (row,), spread, layers, model, data, recipe, {})


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"layers": 8}, (), "the profile is for 8 layers, this model has 6"),
        ({"model": ModelId("other", "b", "0")}, (), "made for another checkpoint (other, b)"),
        ({"schema": 9}, (), "has schema 9, this version reads 1"),
        ({}, ("kv_keep=0.2",), "profile and kv_keep are both given"),
    ],
)
def test_a_profile_that_does_not_fit(
    change: dict[str, Any],
    settings: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "profile.json"
    made = profile(ASSETS / "tiny-llava", change.get("layers", 6))
    dataclasses.replace(made, **change).write(path)
    given = (f"profile={path}", *settings)
    sets = [x for setting in given for x in ("--set", setting)]
    arguments = ("-m", "tiny-llava", "-r", "prefixkv", *sets, "-o", tmp_path / "out")
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_profile_file_decides_the_capacities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every layer its share of the longest sequence, and one slot more."""
    path = tmp_path / "profile.json"
    profile(ASSETS / "tiny-llava", 6).write(path)
    arguments = ("-m", "tiny-llava", "-r", "prefixkv", "--set", f"profile={path}")
    code, out, _ = run(capsys, *arguments, "-o", tmp_path / "out", "--dry-run", "--json")
    assert code == 0
    longest = 2048 + 144
    shares = [math.ceil(longest * f) + 1 for f in [0.4, 0.6] * 3]
    data = json.loads(out)
    assert data["capacity"]["per_layer"] == shares
    assert data["recipe"]["parameters"]["profile"] == "profile.json"  # no path
    assert data["recipe"]["parameters"]["kv_keep"] == 0.5


def test_output_that_is_in_the_way(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    code, _, err = run(capsys, "-m", checkpoint(NAME), "-o", tmp_path)
    assert code == 2
    assert "exists and is not empty" in err
    code, _, err = run(capsys, "-m", checkpoint(NAME), "-o", tmp_path / "a/b")
    assert code == 2
    assert "does not exist" in err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before weights are fetched. Root may write anywhere, so the answer is set."""
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode == os.W_OK))
    code, _, err = run(capsys, "-m", "who/absent", "-o", tmp_path / "out")
    assert code == 2
    assert f"the folder {tmp_path} cannot be written to" in err


def test_disk_too_small(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    code, _, err = run(capsys, "-m", checkpoint(NAME), "-o", tmp_path / "out")
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
    capsys: pytest.CaptureFixture[str],
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
    code, _, err = run(capsys, "-m", checkpoint(NAME), "-o", tmp_path / "out", *dry)
    assert code == 2
    assert "the export needs about 1.6 GB of memory" in err
    assert message in err


def test_listings(capsys: pytest.CaptureFixture[str]) -> None:
    assert "lightvlm" in run(capsys, "--help-recipe")[1]
    text = run(capsys, "--help-recipe", "lightvlm")[1]
    assert "--set keep=0.35" in text
    assert "--set merge=recycle" in text
    assert "trt-rtx" in run(capsys, "--list-targets")[1]


def test_models_are_listed_as_the_families_say(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--list-models")[1]
    assert "tiny-llava  shipped" in text
    parts = {part.partition("\n")[0]: part for part in text.split("\n\n")}
    for name, family in FAMILIES.items():
        lines = [line.split() for line in parts[name].splitlines()]
        for alias, hub_id in family.aliases.items():
            assert [alias, hub_id] in lines
        words = " ".join(parts[name].split())
        assert f"an image becomes: {family.image_handling} video: {family.video or 'no'} " in words
    assert "The weights on the hub were not run" in text
    assert "lightvlm" in text


def test_torchs_threads_wait_asleep(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before torch is imported, which listings do not (next test); not over a user's own."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    run(capsys, "--list-targets")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    run(capsys, "--list-targets")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


LISTINGS = (
    ("--list-models",),
    ("--list-targets",),
    ("--help-recipe",),
    *(("--help-recipe", name) for name in ("none", "lightvlm", "prefixkv")),
)


def test_listings_need_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    """In a process that cannot import it, they say what they say here, in 80 columns."""
    code = (
        "import sys\n"
        "from importlib.abc import MetaPathFinder\n"
        "class Blocked(MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'onnx', 'onnx_ir'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from lvlm.export.export_cli import main\n"
        f"for argv in {LISTINGS!r}: assert main(argv) == 0\n"
        "assert main(['--help-recipe', 'lightvml']) == 2\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "".join(run(capsys, *argv)[1] for argv in LISTINGS)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "did you mean lightvlm" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['lvlm-export', '--help']\n"
        "from lvlm.export.export_cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--recipe" in done.stdout
    assert done.stdout.strip().endswith("[]")


def test_table_marks_what_failed() -> None:
    lines = table([Check("a", 0.1, 1, "x"), Check("b", 2, 1, "x")]).splitlines()
    assert "✓" in lines[0]
    assert "✗" in lines[1]


def test_a_failed_comparison_says_what_failed_and_that_nothing_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = Outcome([Check("prefill.onnx logits", 2, 1, "x")])
    with pytest.raises(ValidationError) as caught:
        outcome.check()
    assert "written" not in str(caught.value)  # that is the exporter's to say
    monkeypatch.setattr(exporter, "write_bundle", lambda *_: None)
    monkeypatch.setattr(validation, "validate", lambda *_: outcome.check())
    code, _, err = run(capsys, "-m", "tiny-llava", "-o", tmp_path / "out", "-q")
    assert code == 2
    assert "(✗ prefill.onnx logits); nothing was written\n" in err
    assert "✗ prefill.onnx logits  2 x (limit 1)" in err
    assert not list(tmp_path.iterdir())
