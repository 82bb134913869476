"""lvlm-export as a user meets it: bundles that are checked, nothing half-written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from settings import SMALL

from lvlm.core.errors import ValidationError
from lvlm.export import exporter
from lvlm.export.export_cli import main
from lvlm.export.verify import graph_forms, validation
from lvlm.export.verify.checks import Check, table
from lvlm.export.verify.outcome import ValidationOutcome
from lvlm.export.weights.weights_file import WEIGHTS, WeightsFile
from lvlm.plugins_trt.engines.engine_answers import check_answers
from lvlm.runtime.bundle.reader import read_bundle

NAME = "llava:llama-mha-bias-rope3-siglip"

pytestmark = pytest.mark.usefixtures("shared_traces")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(capfd, main)


def test_export_validates_and_reports(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Also what was not run; the answers that are recorded are those of the bundle."""
    monkeypatch.setattr(graph_forms, "LARGE", 0)
    code, _, err = run(
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
    foretold = json.loads(run(*parts, "--json")[1])["files"]
    assert foretold == sorted(path.name for path in (tmp_path / "out").iterdir())
    recorded = json.loads((tmp_path / "out/validation.json").read_text())
    assert any(note.startswith("compared at kv_keep 0.5") for note in recorded["notes"])
    assert {c["name"].split()[0] for c in recorded["checks"]} >= {"vision.onnx", "prefill.onnx"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    check_answers(tmp_path / "out", "cpu")
    assert capfd.readouterr().out.count("✓ samples/digits-") == 2


def test_weights_rounded_on_samples_are_validated_and_nothing_else_is_left(
    checkpoint: Callable[[str], Path], tmp_path: Path, run: Run
) -> None:
    """Nor what an export of another form left, which was killed."""
    (tmp_path / ".out-plain.partial-1").mkdir()
    options = ("--weights", "int4", "--block-size", 16, "--calibrate", "-o", tmp_path / "out")
    code, _, err = run("-m", checkpoint(SMALL), "-r", "none", *options)
    assert code == 0, err
    assert "linear layers," in err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    manifest = read_bundle(tmp_path / "out")
    assert manifest.validation == "passed"
    assert manifest.model["calibration"]["method"] == "gptq"
    checks = json.loads((tmp_path / "out/validation.json").read_text())["checks"]
    assert "decode.onnx logits" in {check["name"] for check in checks}


def test_bf16_and_plugins_are_checked_on_what_is_put_into_the_graphs(
    checkpoint: Callable[[str], Path], tmp_path: Path, run: Run
) -> None:
    code, _, err = run(
        *("-m", checkpoint(NAME), "-r", "lightvlm", "--dtype", "bf16", "--target", "trt-11"),
        *("-o", tmp_path / "out"),
    )
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
    checkpoint: Callable[[str], Path], tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    code, text, _ = run("-m", checkpoint(NAME), "-o", out, "--dry-run", "--json")
    assert code == 0
    data = json.loads(text)
    assert data["image_tokens_per_layer"] == [25, 25]
    assert data["capacity"]["per_layer"] == [2048 + 25] * 2
    assert data["peak_memory_estimate_bytes"] > data["weight_bytes"] > 0
    assert not out.exists()


def test_a_failed_check_leaves_no_bundle(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    run: Run,
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
    code, _, err = run("-m", checkpoint(NAME), "-o", tmp_path / "out")
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


def test_table_marks_what_failed() -> None:
    lines = table([Check("a", 0.1, 1, "x"), Check("b", 2, 1, "x")]).splitlines()
    assert "✓" in lines[0]
    assert "✗" in lines[1]


def test_a_failed_comparison_says_what_failed_and_that_nothing_was_written(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = ValidationOutcome([Check("prefill.onnx logits", 2, 1, "x")])
    with pytest.raises(ValidationError) as caught:
        outcome.check()
    assert "written" not in str(caught.value)  # that is the exporter's to say
    monkeypatch.setattr(exporter, "write_bundle", lambda *_: None)
    monkeypatch.setattr(validation, "validate", lambda *_: outcome.check())
    code, _, err = run("-m", "tiny-llava", "-o", tmp_path / "out", "-q")
    assert code == 2
    assert "(✗ prefill.onnx logits); nothing was written\n" in err
    assert "✗ prefill.onnx logits  2 x (limit 1)" in err
    assert not list(tmp_path.iterdir())
