"""Where kernels run, and the plugin library, built once for all of its tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from filelock import FileLock

if TYPE_CHECKING:
    from plugin_library import Built

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tensorrt_headers(shared: Path) -> Path:
    """A folder with include/NvInferRuntime.h: TENSORRT_ROOT's, or fetched."""
    if given := os.environ.get("TENSORRT_ROOT"):
        return Path(given)
    folder = shared / "tensorrt-headers"
    with FileLock(f"{folder}.lock"):
        done = subprocess.run(
            ["bash", str(ROOT / "scripts/fetch_tensorrt_headers.sh"), str(folder)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHON": sys.executable},
        )
    assert done.returncode == 0, f"set TENSORRT_ROOT, or go online: {done.stderr}"
    return folder


@pytest.fixture(scope="session")
def built(shared: Path, tensorrt_headers: Path) -> Built:
    """The plugin library of this run's tests."""
    import plugin_library

    return plugin_library.make(shared / "plugin-library", tensorrt_headers)


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
