"""The library of CPU kernels: found, switched off, broken, not buildable."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import Run, one_line
from cpu_kernels import make_build

from lvlm.core.errors import BackendError, BuildError
from lvlm.core.progress import Progress
from lvlm.plugins_trt import build_cli
from lvlm.runtime.backends.cpu import Backend
from lvlm.runtime.backends.ort.kernels import kernel_build, kernel_library
from lvlm.runtime.backends.ort.kernels.kernel_library import KERNELS, LIBRARY, SOURCES, find_kernels


def test_the_backend_takes_what_is_named(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS, str(kernels))
    assert Backend().kernels == kernels
    assert find_kernels().instructions
    monkeypatch.setenv(KERNELS, "off")
    assert Backend().kernels is None


def test_a_library_that_was_built_is_found(
    kernels: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(KERNELS, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert (found := find_kernels()).path is None
    assert (found.why, found.mend[:14]) == ("not built", "lvlm-build cpu")
    place = kernel_library.default_folder() / LIBRARY
    place.parent.mkdir(parents=True)
    place.symlink_to(kernels)
    assert find_kernels().path == place


def test_one_that_is_named_and_does_not_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "none.so").write_bytes(b"no library")
    monkeypatch.setenv(KERNELS, str(tmp_path / "none.so"))
    with pytest.raises(BackendError, match=r"cannot be loaded .*LVLM_CPU_KERNELS=off") as caught:
        Backend()
    assert "\n" not in str(caught.value)


def test_an_old_cpu_runs_functions_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = SimpleNamespace(lvlm_instructions=lambda: None)
    monkeypatch.setattr(kernel_library.ctypes, "CDLL", lambda _: old)
    monkeypatch.setenv(KERNELS, str(tmp_path / "old.so"))
    said: list[str] = []
    monkeypatch.setattr(
        kernel_library.notes, "warning", lambda text, line: said.append(text % line)
    )
    assert [kernel_library.kernel_library() for _ in range(2)] == [None, None]
    assert said == [
        "lvlm: this CPU has neither AVX2 nor NEON, which the CPU kernels need; standard operators "
        "run in their place"
    ]


@pytest.mark.parametrize(("cpu", "instructions"), [("Nehalem", "no"), ("Haswell", "AVX2")])
def test_the_library_knows_an_old_cpu(
    cpu: str, instructions: str, shared: Path, pytestconfig: pytest.Config
) -> None:
    """Python and all under an emulator of that CPU."""
    library = make_build("all", shared, pytestconfig)
    if platform.machine() not in ("x86_64", "AMD64") or shutil.which("qemu-x86_64") is None:
        pytest.skip("qemu-x86_64 is not installed, or this is no x86")
    ask = (
        f"from {kernel_library.__name__} import find_kernels as f; print(f().instructions or 'no')"
    )
    done = subprocess.run(
        ["qemu-x86_64", "-cpu", cpu, sys.executable, "-c", ask],
        env=os.environ | {KERNELS: str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == instructions, done.stderr


def test_what_is_missing_to_build_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    text = (SOURCES / "CMakeLists.txt").read_text()
    (sources / "CMakeLists.txt").write_text(text.replace("hwy/highway.h", "hwy/none.h"))
    monkeypatch.setattr(kernel_build, "SOURCES", sources)
    status, _, error = Run(capfd, build_cli.main)("cpu", "-q", "-o", tmp_path / "out")
    assert status == 2
    assert "Highway is not installed; apt install libhwy-dev" in one_line(error, "lvlm-build")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(BuildError, match="cmake is not installed; pip install cmake"):
        kernel_build.build_kernels(tmp_path, jobs=1, progress=Progress(1, quiet=True))
