"""``lvlm-doctor``: what this machine can run, and why not the rest."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lvlm.runtime.console import Parser, run_main

NOTHING = 1  # exit status where no device at all can be used


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return run_main("lvlm-doctor", lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lvlm-doctor",
        description="Look at the driver, the GPUs, ONNX Runtime, TensorRT and, if given, a bundle "
        "and its engines. Every ✗ says how to mend it. Exit status 1 if nothing can run.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", nargs="?", type=Path, help="look at it, too")
    parser.add_argument("--json", action="store_true", help="a list of findings")
    return parser


def _run(args: argparse.Namespace) -> int:
    from lvlm.runtime.doctor import as_json, can_run, examine

    findings = examine(args.bundle)
    if args.json:
        print(as_json(findings))
    else:
        width = max(len(f.subject) for f in findings)
        for f in findings:
            print(f"{'✓' if f.ok else '✗'} {f.subject:{width}}  {f.says}")
            if not f.ok:
                print(f"  {'':{width}}  → {f.fix}")
    return 0 if can_run(findings) else NOTHING
