"""What pytest makes of test modules whose imports are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_an_optional_package_is_skipped_and_another_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "openvino.py").write_text("raise ModuleNotFoundError('no', name='openvino')")
    for module in ("openvino", "opnvino"):
        (tmp_path / f"test_{module}.py").write_text(f"import {module}\n\ndef test() -> None: ...\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-p",
            "conftest",
            *sorted(tmp_path.glob("test_*")),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(TESTS), *sys.path))},
        capture_output=True,
        text=True,
    )
    assert "openvino is not installed" in done.stdout
    assert "No module named 'opnvino'" in done.stdout
    assert "1 skipped, 1 error" in done.stdout, done.stdout
