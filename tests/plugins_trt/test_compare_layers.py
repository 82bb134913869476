"""scripts/compare_layers.py as a user runs it, against ONNX Runtime: the part without a GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lowered(bundle: Callable[..., Path]) -> Path:
    return bundle("tiny-llava", "lightvlm", targets=("trt-rtx",))


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/compare_layers.py"), str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_lowered_graphs_agree(lowered: Path) -> None:
    done = compare(lowered, "--against", "onnxruntime", "--graph", "prefill")
    assert done.returncode == 0, done.stderr
    assert "✓ prefill: " in done.stdout
    for op in ("CausalAttention", "CacheImportance", "CacheCompact", "TokenImportance"):
        assert f"✓   {op} that gives" in done.stdout
    assert "✗" not in done.stdout


def test_a_difference_is_found(lowered: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(lowered, tmp_path / "changed")
    file = folder / "vision.trt-rtx.onnx"
    model = onnx.load(file, load_external_data=False)
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    next(a for a in norm.attribute if a.name == "epsilon").f = 0.5
    onnx.save(model, file)
    done = compare(folder, "--against", "onnxruntime", "--graph", "vision", "--verify", "none")
    assert done.returncode == 1, done.stderr
    assert "✗ vision: " in done.stdout


def test_graphs_that_were_not_lowered(bundle: Callable[..., Path]) -> None:
    done = compare(bundle("tiny-llava", "lightvlm"), "--against", "tensorrt")
    assert done.returncode == 2
    assert "lvlm-build engine" in done.stderr
    assert "Traceback" not in done.stderr
