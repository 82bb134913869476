"""``lvlm-build plugins``: the library of TensorRT plugins, for given GPUs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lvlm.plugins_trt.plugins.architectures import SHARED_LIMIT, parse_architectures


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plugins",
        help="the library of plugins, liblvlm_plugins.so",
        description="Compile the ops' kernels for the given GPUs, without one, and build the "
        "library of TensorRT plugins. GPUs that are not named run code which their driver "
        "compiles.",
        epilog="example: lvlm-build plugins --arch 87,89 -o plugins/",
    )
    add = parser.add_argument
    add(
        "--arch",
        metavar="N,…",
        required=True,
        help="compute capabilities without the dot: " + ", ".join(map(str, SHARED_LIMIT)),
    )
    add("-o", "--output", metavar="FOLDER", type=Path, required=True, help="where it goes")
    add(
        "--tensorrt-root",
        metavar="FOLDER",
        type=Path,
        help="TensorRT SDK, with include/ (default: where its Debian package puts it)",
    )
    add(
        "--cuda-root",
        metavar="FOLDER",
        type=Path,
        help="CUDA toolkit, with include/ (default: the headers that Triton has)",
    )
    add(
        "--sources-only",
        action="store_true",
        help="stop before the C++ compiler: FOLDER/source builds with cmake on the device itself, "
        "without Python",
    )
    add("--jobs", metavar="N", type=int, default=2, help="processes that compile (default 2)")
    add("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lvlm.core.errors import ParameterError
    from lvlm.core.progress import Progress

    archs = parse_architectures(args.arch.split(","))
    if args.jobs < 1:
        raise ParameterError(f"--jobs is {args.jobs}; at least 1 is needed")
    for flag, folder, header in (
        ("--tensorrt-root", args.tensorrt_root, "NvInferRuntime.h"),
        ("--cuda-root", args.cuda_root, "cuda.h"),
    ):
        if folder and not (folder / "include" / header).is_file():
            raise ParameterError(f"{flag} {folder}: there is no include/{header} in it")
    plugins = _plugins()

    from lvlm.plugins_trt.plugins import library_build

    stages = library_build.STAGES - bool(args.sources_only)
    progress = Progress(stages, quiet=args.quiet)
    if args.sources_only:
        made = library_build.make_sources(
            plugins, archs, args.output, jobs=args.jobs, progress=progress
        )
    else:
        headers = library_build.Headers(args.tensorrt_root, args.cuda_root)
        made = library_build.build_library(
            plugins, archs, args.output, headers=headers, jobs=args.jobs, progress=progress
        )
    print(made)
    return 0


def _plugins() -> list[Any]:
    from lvlm.core.errors import BuildError
    from lvlm.core.installing import install

    try:
        from lvlm.plugins_trt.plugins.registry import plugins

        return list(plugins().values())
    except ImportError as error:
        if error.name and error.name.split(".")[0] == "triton":
            raise BuildError(f"kernels are compiled with Triton; {install('plugins')}") from None
        raise
