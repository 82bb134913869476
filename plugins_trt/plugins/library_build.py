"""The plugin library: kernels compiled, C++ written, cmake and a C++ compiler run."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lvlm.core import cmake
from lvlm.core.errors import BuildError
from lvlm.core.progress import Progress, size
from lvlm.plugins_trt.plugins.kernel_compiler import compile_kernels
from lvlm.plugins_trt.plugins.kernels import all_kernels
from lvlm.plugins_trt.plugins.plugin_plan import Plugin
from lvlm.plugins_trt.plugins.sources import write_sources

LIBRARY = "liblvlm_plugins.so"
HARNESS = "lvlm_plugin_harness"
SHELL = Path(__file__).parents[1] / "library"  # the C++ that all plugins share
STAGES = 3


@dataclass(frozen=True)
class Headers:
    """Folders with include/NvInferRuntime.h and include/cuda.h; None: where cmake finds them."""

    tensorrt: Path | None = None
    cuda: Path | None = None


def build_library(
    plugins: Sequence[Plugin],
    archs: Sequence[int],
    folder: Path,
    *,
    headers: Headers,
    jobs: int,
    progress: Progress,
) -> Path:
    """``folder``/LIBRARY for these architectures. Raises BuildError if anything is missing or does
    not compile."""
    cmake.check_tools()
    with _written(folder / "source"):
        copy_shell(folder / "source")
    check_headers(headers)
    sources = make_sources(plugins, archs, folder, jobs=jobs, progress=progress)
    with progress.stage(f"build {LIBRARY}") as stage:
        built = run_cmake(sources, folder / "build", "lvlm_plugins", headers, jobs)
        library = folder / LIBRARY
        fresh = shutil.copy(built, folder / f"{LIBRARY}.new")
        os.replace(fresh, library)  # a process that uses the old one keeps it
        stage.result = size(library.stat().st_size)
    return library


def make_sources(
    plugins: Sequence[Plugin],
    archs: Sequence[int],
    folder: Path,
    *,
    jobs: int,
    progress: Progress,
) -> Path:
    """``folder``/source, which cmake builds without Python and Triton, on another machine too."""
    sources = folder / "source"
    with _written(sources):  # first: compiling takes minutes
        copy_shell(sources)
    compiled = compile_kernels(all_kernels(plugins), archs, jobs=jobs, progress=progress)
    with progress.stage("write C++") as stage:
        with _written(sources):
            write_sources(sources, plugins, compiled)
        stage.result = size((sources / "kernels.bin").stat().st_size)
    return sources


@contextlib.contextmanager
def _written(sources: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BuildError(f"{sources} cannot be written: {error.strerror or error}") from None


def copy_shell(sources: Path) -> None:
    """The C++ that all plugins share, to where tables.cpp and kernels.bin go."""
    shutil.copytree(SHELL, sources, copy_function=shutil.copyfile, dirs_exist_ok=True)


def check_headers(headers: Headers) -> None:
    """Raises BuildError where cmake finds no headers or the compiler does not work: kernels, which
    take minutes, need neither."""
    with tempfile.TemporaryDirectory() as place:
        sources = Path(place)
        copy_shell(sources)
        for name in ("tables.cpp", "kernels.bin"):
            (sources / name).touch()
        with _own_options():
            cmake.configure(sources, sources / "build", _options(headers))


def run_cmake(sources: Path, build: Path, target: str, headers: Headers, jobs: int) -> Path:
    """The built file of one target. Raises BuildError with the first thing that went wrong."""
    with _own_options():
        cmake.run_cmake(sources, build, target, _options(headers), jobs)
    name = f"lib{target}.so" if target == "lvlm_plugins" else target
    return build / name


def _options(headers: Headers) -> list[str]:
    options = []
    if headers.tensorrt:
        options.append(f"-DTENSORRT_ROOT={headers.tensorrt.resolve()}")
    if cuda := headers.cuda or triton_headers():
        options.append(f"-DCUDA_ROOT={cuda.resolve()}")
    return [*options, "-UTENSORRT_INCLUDE", "-UCUDA_INCLUDE"]  # other folders than last time, maybe


@contextlib.contextmanager
def _own_options() -> Iterator[None]:
    """CMake's options are said as those of lvlm-build."""
    try:
        yield
    except BuildError as error:
        message = str(error)
        for name in ("tensorrt", "cuda"):
            message = message.replace(f"-D{name.upper()}_ROOT=", f"--{name}-root")
        raise BuildError(message) from None


def triton_headers() -> Path | None:
    """CUDA's headers come with Triton, so that no CUDA toolkit is needed."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia"
    complete = all((folder / "include" / f).exists() for f in ("cuda.h", "cuda_runtime_api.h"))
    return folder if complete else None
