"""Building C++ with CMake: what it needs, and the first thing that went wrong, in one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lvlm.core.errors import BuildError

OURS = re.compile(r"lvlm: (.*?)\n\s*\n", re.DOTALL)  # cmake breaks its lines


def check_tools() -> None:
    """Raises BuildError if a program that building needs is not there."""
    _cmake()
    if not os.environ.get("CXX") and shutil.which("c++") is None:
        raise BuildError("there is no C++ compiler; apt install g++, say, or set CXX")


def run_cmake(sources: Path, build: Path, target: str, options: Sequence[str], jobs: int) -> None:
    """Build one target of ``sources`` in the folder ``build``. Raises BuildError with the message
    that tells most: one of the project's own (``lvlm: …``), or else the first error."""
    configure(sources, build, options)
    _run([_cmake(), "--build", str(build), "--target", target, "--parallel", str(jobs)])


def configure(sources: Path, build: Path, options: Sequence[str]) -> None:
    """Let CMake look for what building ``sources`` needs, without building. Raises BuildError."""
    _run([_cmake(), "-S", str(sources), "-B", str(build), *options])


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
    text = done.stderr + done.stdout
    if own := OURS.search(text):
        raise BuildError(" ".join(own[1].split()))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    raise BuildError(f"cmake failed: {(telling or lines or ['no message'])[0]}")
