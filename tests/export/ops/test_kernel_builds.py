"""Every CPU kernel under sanitizers and on Arm, most of it by kernel_driver.cpp."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from kernel_cases import OPS, kernel_cases
from kernel_driver import Run, build_driver, run_driver
from single_node import feeds, single_node_model

ROOT = Path(__file__).parents[3]
TESTS = ["tests/export/ops/test_cpu_kernels.py", "tests/export/targets"]  # with kernels
# No report is passed by: the first ends the program.
ADDRESS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-O1", "-g", "-fsanitize=thread")
HASWELL = ("-march=haswell", "-maes")  # AVX2; Highway's asks for AES
# The machine's own headers come last: Highway's are for any CPU
ARM = ("-O1", "-static", "-idirafter", "/usr/include")


@dataclass(frozen=True)
class Build:
    """Flags of a compiler, and what runs the program if this machine does not."""

    flags: tuple[str, ...]
    compiler: str = "g++"
    emulator: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


def arm(cpu: str, *flags: str) -> Build:
    return Build((*ARM, *flags), "aarch64-linux-gnu-g++", ("qemu-aarch64", "-cpu", cpu))


BUILDS = {
    "address": Build((*ADDRESS, "-march=native")),
    "address, AVX2": Build((*ADDRESS, *HASWELL)),
    "thread": Build((*THREAD, "-march=native"), settings={"TSAN_OPTIONS": "halt_on_error=1"}),
    "thread, AVX2": Build((*THREAD, *HASWELL), settings={"TSAN_OPTIONS": "halt_on_error=1"}),
    "Arm": arm("cortex-a72", "-march=armv8-a"),
    "Arm, later": arm("cortex-a76", "-march=armv8.2-a+crypto+fp16+dotprod"),
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_kernels_compute_the_reference(
    build: Build, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    if not pytestconfig.getoption("--whole"):
        pytest.skip("compiles for minutes: --whole")
    if "-march=haswell" in build.flags and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("AVX2 is x86's")
    if build.emulator and shutil.which(build.emulator[0]) is None:
        pytest.skip(f"{build.emulator[0]} is not installed")
    program = build_driver(build.compiler, build.flags, tmp_path)
    cases = list(kernel_cases())
    runs = [case.run for case in cases]
    *found, said = run_driver(
        [*build.emulator, str(program)], [*runs, refused()], tmp_path, build.settings
    )
    assert said == "lvlm::CacheUpdate: entries go beyond the cache"
    for case, got in zip(cases, found, strict=True):
        assert not isinstance(got, str), f"{case.name}: {got}"
        case.check(got)


def test_under_onnxruntime_too(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """More shapes, and what is refused. Not for the thread sanitizer, for which ONNX Runtime would
    have to be compiled as well."""
    if not pytestconfig.getoption("--whole"):
        pytest.skip("compiles for minutes: --whole")
    libraries = [_of_compiler(name) for name in ("libasan.so", "libstdc++.so")]
    if not all(libraries):
        pytest.skip("there is no g++ with an address sanitizer")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *TESTS]
    options = ["--sanitize", "address,undefined", "--basetemp", str(tmp_path / "run")]
    # What Python leaves behind is no leak of ours
    preloaded = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [*command, *options],
        cwd=ROOT,
        env=os.environ | preloaded,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout[-5_000:] + done.stderr[:20_000]
    assert done.returncode == 0, said
    if " passed" not in said:
        pytest.skip(f"nothing was run: {said}")


def _of_compiler(name: str) -> str:
    """The path of a library of g++; empty: it has none."""
    if shutil.which("g++") is None:
        return ""
    asked = ["g++", f"-print-file-name={name}"]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return said if Path(said).is_absolute() else ""


def refused() -> Run:
    sample = next(OPS["CacheUpdate"].samples())
    given = feeds(OPS["CacheUpdate"], sample)
    given["index"] = given["index"] + 100
    return Run(single_node_model(OPS["CacheUpdate"], sample, function=False), given)
