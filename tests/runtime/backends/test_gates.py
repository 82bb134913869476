"""The gate of the CPU kernels by itself, under the thread sanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lvlm.runtime.backends.ort.kernels.kernel_library import SOURCES


def test_nothing_goes_on_while_it_is_shut(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--whole"):
        pytest.skip("compiles with a sanitizer: --whole")
    if (compiler := shutil.which("g++") or shutil.which("clang++")) is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path / "gate_threads"
    sources = [Path(__file__).parent / "gate_threads.cpp", SOURCES / "gate.cpp"]
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{SOURCES}"]
    made = subprocess.run(
        [compiler, *flags, *sources, "-o", program], capture_output=True, text=True, check=False
    )
    if "tsan" in made.stderr:
        pytest.skip("the compiler has no thread sanitizer")
    assert made.returncode == 0, made.stderr
    ran = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "WARNING: ThreadSanitizer" not in ran.stderr
