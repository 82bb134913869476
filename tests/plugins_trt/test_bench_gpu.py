"""scripts/bench_gpu.py as far as a CPU goes: a row of ours, and what it refuses before any work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lvlm

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_a_row_has_its_figures(
    bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_gpu
    from random_prompt import prompt_for

    with lvlm.load(bundle("digits-llava", max_images=2)) as model:
        prompts = [prompt_for(model.manifest, 160, 4, row) for row in range(2)]
        found = bench_gpu.run_ours(model, prompts, 4, {})
    text = model.manifest.text
    entry = 2 * text.kv_heads * text.head_dim * 4
    assert found["cache"] >= 2 * 160 * text.layers * entry
    assert found["prefill"] > 0
    assert found["step"] > 0


@pytest.mark.slow
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    work = tmp_path / "work"
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "bench_gpu.py"), "--work", str(work), "--device", "cuda"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1
    assert "CUDAExecutionProvider" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not work.exists()
