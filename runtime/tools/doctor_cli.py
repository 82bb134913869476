"""``lvlm-doctor``: what this machine can run, and why not the rest."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lvlm.core.console import Parser, run_main

UNUSABLE = 2  # exit status where something is broken, or nothing can run


def main(argv: Sequence[str] | None = None) -> int:
    return run_main("lvlm-doctor", lambda: _run(make_parser().parse_args(argv)))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lvlm-doctor",
        description="Look at the driver, the GPUs, ONNX Runtime, TensorRT and, if given, a bundle "
        "and its engines; all its files are hashed. ✓ works, a dash is not installed or not there, "
        "✗ is broken; both say what to do. Exit status: 0 something can run and nothing is broken, "
        "2 otherwise.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", nargs="?", type=Path, help="look at it, too")
    parser.add_argument("--json", action="store_true", help="a list of findings")
    return parser


def _run(args: argparse.Namespace) -> int:
    from lvlm.core.wrapping import wrapped
    from lvlm.runtime.tools.doctor import examine
    from lvlm.runtime.tools.findings import as_json, can_run

    findings = examine(args.bundle)
    if args.json:
        print(as_json(findings))
    else:
        width = max(len(f.subject) for f in findings)
        for f in findings:
            print(wrapped(f"{f.mark} {f.subject:{width}}  ", f.says))
            if not f.ok:
                print(wrapped(f"  {'':{width}}  → ", f.fix))
    return 0 if can_run(findings) else UNUSABLE
