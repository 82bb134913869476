"""``lvlm-build``: plugins and engines for TensorRT, CPU kernels, a repository for Triton."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from lvlm.core.console import Parser, run_main

# Each has add_parser(subparsers), which sets ``run``, and imports nothing heavy before it runs.
SUBCOMMANDS = (
    "lvlm.plugins_trt.plugins.plugins_cli",
    "lvlm.plugins_trt.engines.engine_cli",
    "lvlm.runtime.backends.ort.kernels.kernels_cli",
    "lvlm.runtime.server.triton_server.triton_cli",
)


def main(argv: Sequence[str] | None = None) -> int:
    return run_main("lvlm-build", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="lvlm-build",
        description="Build what TensorRT, the CPU or Triton Inference Server needs for a bundle.",
        epilog="example: lvlm-build plugins --arch 87 -o plugins/",
    )
    subparsers = parser.add_subparsers(metavar="WHAT", required=True, parser_class=Parser)
    for module in SUBCOMMANDS:
        importlib.import_module(module).add_parser(subparsers)
    args = parser.parse_args(argv)
    return int(args.run(args))
