"""Building C++ with CMake: what it needs, and the first thing that went wrong, in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lvlm.core.errors import BuildError


def check_tools() -> None:
    """Raises BuildError if a program that building needs is not there."""
    _cmake()
    if not os.environ.get("CXX") and shutil.which("c++") is None:
        raise BuildError("there is no C++ compiler; apt install g++, say, or set CXX")


def run_cmake(sources: Path, build: Path, target: str, options: Sequence[str], jobs: int) -> None:
    """Build one target of ``sources`` in the folder ``build``. Raises BuildError with the message
    that tells most: one of the project's own (``lvlm: …``), or else the first error."""
    _run([_cmake(), "-S", str(sources), "-B", str(build), *options])
    _run([_cmake(), "--build", str(build), "--target", target, "--parallel", str(jobs)])


def _cmake() -> str:
    """From the path, or of this Python environment, as pip installs it."""
    found = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if found is None:
        raise BuildError("cmake is not installed; pip install cmake")
    return found


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    for line in lines:
        if line.startswith("lvlm: "):
            raise BuildError(line.removeprefix("lvlm: "))
    telling = [line for line in lines if "error" in line.lower()]
    raise BuildError(f"cmake failed: {(telling or lines or ['no message'])[0]}")
