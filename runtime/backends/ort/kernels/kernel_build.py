"""Building the library of kernels with CMake, a C++ compiler and Highway."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from lvlm.core.cmake import check_tools, run_cmake
from lvlm.core.errors import BuildError
from lvlm.core.progress import Progress, size
from lvlm.runtime.backends.ort.kernels.kernel_library import LIBRARY, SOURCES

STAGES = 1


def build_kernels(folder: Path, *, jobs: int, progress: Progress) -> Path:
    """``folder``/LIBRARY. Raises BuildError where something is missing or does not compile."""
    check_tools()
    try:
        with progress.stage(f"build {LIBRARY}") as stage, tempfile.TemporaryDirectory() as work:
            run_cmake(SOURCES, Path(work), "lvlm_kernels", [], jobs)
            folder.mkdir(parents=True, exist_ok=True)
            fresh = shutil.copy(Path(work) / LIBRARY, folder / f"{LIBRARY}.{os.getpid()}")
            library = folder / LIBRARY
            os.replace(fresh, library)  # a process that uses the old one keeps it
            stage.result = size(library.stat().st_size)
    except OSError as error:
        raise BuildError(f"{folder} cannot be written: {error.strerror or error}") from None
    return library
