"""The library of CPU kernels for tests, made once a run."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from filelock import FileLock

from lvlm.core.errors import BuildError
from lvlm.core.progress import Progress
from lvlm.runtime.backends.ort.kernels.kernel_build import build_kernels
from lvlm.runtime.backends.ort.kernels.kernel_library import LIBRARY

MISSING = ("is not installed", "no C++ compiler")
# One kind of instructions, this CPU's, and little optimization: a fifth of the compiler's time
FLAGS = "-O1 -march=native -DHWY_COMPILE_ONLY_STATIC"


def make_kernels(folder: Path, flags: str = FLAGS) -> Path:
    """The library, below ``folder``; made by one process, waited for by the others. Skips where
    something that building needs is missing."""
    with FileLock(f"{folder}.lock"), pytest.MonkeyPatch.context() as patch:
        if not (folder / LIBRARY).exists():
            patch.setenv("CXXFLAGS", flags)
            patch.setenv("CMAKE_BUILD_TYPE", "None" if flags else "Release")
            try:
                build_kernels(folder, jobs=1, progress=Progress(1, quiet=True))
            except BuildError as error:
                if not any(what in str(error) for what in MISSING):
                    raise
                pytest.skip(str(error))
    return folder / LIBRARY


# Compiler's flags of what users have, and of AVX2 alone. GCC's haswell is without AES, which
# Highway's AVX2 asks for.
BUILDS = {"all": "", "haswell": "-O1 -march=haswell -maes -DHWY_COMPILE_ONLY_STATIC"}


def make_build(build: str, shared: Path, config: pytest.Config) -> Path:
    """The library of BUILDS, made once a run; skips without --whole."""
    if not config.getoption("--whole"):
        pytest.skip("compiles for minutes: --whole")
    if build == "haswell" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("AVX2 is x86's")
    return make_kernels(shared / f"cpu-kernels-{build}", BUILDS[build])
