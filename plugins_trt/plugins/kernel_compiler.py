"""Kernels to machine code, ahead of time and without a GPU: one cubin per architecture and, for
GPUs that none of them is for, PTX, which a driver compiles itself.

Work is done by other processes, since a kernel must be imported anew where Triton's interpreter is
on. Triton's cache keeps what was compiled; an unchanged kernel is not compiled again.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from lvlm.core.errors import BuildError
from lvlm.core.progress import Progress
from lvlm.plugins_trt.plugins.architectures import PORTABLE, SHARED_LIMIT
from lvlm.plugins_trt.plugins.kernels import CONSTEXPR, Kernel

# PTX of this version is understood by every driver since CUDA 12.0; newer code needs newer ones.
PTX_VERSION = 80
PTX_TYPES = {"i32": "32", "fp32": "32"}  # bits, as .u32, .b32 or .f32; pointers are 64
EXTRAS = ("64", "64")  # what Triton adds at the end: scratch pointers, null here


@dataclass(frozen=True)
class Image:
    """One kernel as the driver takes it.

    code     a cubin, or PTX that ends in a zero
    entry    the function's name in it
    threads  of a block; ``shared`` bytes of its memory
    extras   null pointers that a launch gives after the arguments
    """

    arch: int
    ptx: bool
    code: bytes
    entry: str
    threads: int
    shared: int
    extras: int


Compiled = dict[Kernel, tuple[Image, ...]]


def compile_kernels(
    kernels: Sequence[Kernel], archs: Sequence[int], *, jobs: int, progress: Progress
) -> Compiled:
    """The images of every kernel: a cubin for each architecture, then PTX.

    Raises BuildError for a kernel that does not compile, or that needs what the library does not
    give it: more shared memory than the architecture has, global scratch memory, clusters.
    """
    portable = min((arch for arch in archs if PORTABLE <= arch < 90), default=PORTABLE)
    tasks = [(kernel, arch) for kernel in kernels for arch in sorted({*archs, portable})]
    found: dict[Kernel, dict[int, tuple[Image, Image]]] = {kernel: {} for kernel in kernels}
    with (
        progress.stage(f"compile {len(kernels)} kernels for {_names(archs)}") as stage,
        ProcessPoolExecutor(
            max(1, min(jobs, len(tasks))),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(str(cache_folder()),),
        ) as pool,
    ):
        running = {pool.submit(_compile, *task): task for task in tasks}
        try:
            for done, future in enumerate(as_completed(running), 1):
                kernel, arch = running[future]
                found[kernel][arch] = within_shared_memory(future.result(), kernel, arch)
                stage.add_item(done, len(tasks), skipped=0)
        except BrokenProcessPool:
            raise BuildError("a compiling process died; is memory left? try --jobs 1") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {
        kernel: (*(images[arch][0] for arch in archs), images[portable][1])
        for kernel, images in found.items()
    }


def cache_folder() -> Path:
    """The folder of compiled kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvlm" / "kernels"


def _names(archs: Sequence[int]) -> str:
    return ", ".join(f"sm_{arch}" for arch in archs)


def within_shared_memory(
    result: tuple[Image, Image] | str, kernel: Kernel, arch: int
) -> tuple[Image, Image]:
    """A compiled kernel's images. Raises BuildError if it was not compiled, or if one needs more
    shared memory than its GPU has."""
    if isinstance(result, str):
        raise BuildError(f"{kernel} for sm_{arch}: {result}")
    for image in result:
        limit = min(SHARED_LIMIT.values()) if image.ptx else SHARED_LIMIT[arch]
        if image.shared > limit:
            raise BuildError(
                f"{kernel} needs {image.shared:,} bytes of shared memory; "
                f"{'some GPU has' if image.ptx else f'sm_{arch} has'} {limit:,}"
            )
    return result


def _start(cache: str) -> None:
    """Before Triton is imported: compile, do not interpret; no file names in the code."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"


def _compile(kernel: Kernel, arch: int) -> tuple[Image, Image] | str:
    """(cubin, PTX), or what is wrong: not every error of Triton's can be sent as it is."""
    try:
        return _images(kernel, arch)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"


def _images(kernel: Kernel, arch: int) -> tuple[Image, Image]:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=getattr(importlib.import_module(kernel.module), kernel.function),
        signature=dict(kernel.signature),
        constexprs=dict(kernel.constants),
        # Every buffer of TensorRT's starts at a multiple of 256 bytes, as do our scratch buffers.
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, (_, kind) in enumerate(kernel.signature)
            if kind.startswith("*")
        },
    )
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages, "enable_fp_fusion": True}
    if arch < 90:
        options["ptx_version"] = PTX_VERSION
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    metadata, ptx = compiled.metadata, compiled.asm["ptx"]
    for name in ("global_scratch_size", "profile_scratch_size", "launch_pdl"):
        if getattr(metadata, name, 0):
            raise BuildError(f"{name} is {getattr(metadata, name)}; the library has no such thing")
    if getattr(metadata, "num_ctas", 1) != 1 or getattr(metadata, "launch_cooperative_grid", False):
        raise BuildError("it wants a cluster or a cooperative grid, which the library does not do")
    rest = {
        "arch": arch,
        "entry": metadata.name,
        "threads": 32 * metadata.num_warps,
        "shared": metadata.shared,
        "extras": added_pointers(ptx, kernel.parameters),
    }
    return (
        Image(ptx=False, code=compiled.asm["cubin"], **rest),
        Image(ptx=True, code=ptx.encode() + b"\0", **rest),
    )


def added_pointers(ptx: str, parameters: Sequence[str]) -> int:
    """The number of pointers Triton added to a function's parameters. Raises BuildError if these
    are not the expected ones."""
    entry = re.search(r"\.visible \.entry \w+\(([^)]*)\)", ptx)
    found = re.findall(r"\.param \.[a-z](\d+)", entry[1]) if entry else []
    given = [PTX_TYPES.get(kind, "64") for kind in parameters if kind != CONSTEXPR]
    added = found[len(given) :]
    if found[: len(given)] != given or tuple(added) != EXTRAS[: len(added)]:
        raise BuildError(f"its parameters have {found} bits; {given} are given")
    return len(added)
