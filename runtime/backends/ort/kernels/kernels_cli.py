"""``lvlm-build cpu``: the library of kernels for device cpu."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "cpu",
        help="kernels for device cpu, liblvlm_kernels.so",
        description="Compile the kernels of our own ops for ONNX Runtime on this machine's kind of "
        "CPU. Device cpu uses them where they are found; without them it computes the same with "
        "standard operators. Needs cmake, a C++ compiler and Highway (apt install libhwy-dev).",
        epilog="example: lvlm-build cpu",
    )
    add = parser.add_argument
    add(
        "-o",
        "--output",
        metavar="FOLDER",
        type=Path,
        help="where it goes, to be named in LVLM_CPU_KERNELS (default: the user's cache, where "
        "device cpu finds it)",
    )
    add("--jobs", metavar="N", type=int, default=2, help="processes that compile (default 2)")
    add("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lvlm.core.errors import ParameterError
    from lvlm.core.progress import Progress
    from lvlm.runtime.backends.ort.kernels import kernel_build, kernel_library

    if args.jobs < 1:
        raise ParameterError(f"--jobs is {args.jobs}; at least 1 is needed")
    folder = args.output or kernel_library.default_folder()
    progress = Progress(kernel_build.STAGES, quiet=args.quiet)
    print(kernel_build.build_kernels(folder, jobs=args.jobs, progress=progress))
    return 0
