"""``lvlm-compare``: a bundle with its checkpoint, with other devices, and layer by layer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvlm.core.console import Parser, add_verify, run_main
from lvlm.export.packages import EXPORTING, check_installed

ENGINES = {"tensorrt": "trt-11", "tensorrt-rtx": "trt-rtx", "onnxruntime": "trt-rtx"}
LOWERED = ["torch", "transformers", "onnx", "safetensors"]


def main(argv: Sequence[str] | None = None) -> int:
    return run_main("lvlm-compare", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="lvlm-compare",
        description="Compare what a bundle computes with its checkpoint, with itself on another "
        "device, or with another engine layer by layer. Exit status: 0 alike, 1 not, 2 a mistake.",
        epilog="example: lvlm-compare layers out/ --against tensorrt-rtx",
    )
    subparsers = parser.add_subparsers(metavar="WHAT", required=True, parser_class=Parser)
    for add in (_add_checkpoint, _add_devices, _add_layers):
        add(subparsers)
    args = parser.parse_args(argv)
    return int(args.run(args))


def _add_checkpoint(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "checkpoint",
        help="as lvlm-export compares it",
        description="Compare a finished bundle with its checkpoint again, as lvlm-export does; "
        "print every comparison, time and memory.",
        epilog="example: lvlm-compare checkpoint out/ -m llava",
    )
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder made by lvlm-export")
    parser.add_argument(
        "-m", "--model", metavar="MODEL", required=True, help="alias, local folder or hub id"
    )
    parser.set_defaults(run=_checkpoint)


def _add_devices(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "devices",
        help="answers on another device, token for token",
        description="Does a bundle answer on this machine's device as it answered elsewhere? "
        "Greedy answers to one image, none, and a ragged batch with both: --write keeps their "
        "tokens, --expect compares with them. The device need not be where the file was written.",
        epilog="examples: lvlm-compare devices out/ --device cpu --write tokens.json · "
        "lvlm-compare devices out/ --device cuda --expect tokens.json",
    )
    parser.add_argument("bundles", metavar="BUNDLE", nargs="+", type=Path, help="told by name")
    parser.add_argument(
        "--device", metavar="DEVICE", default="cpu", help="what to run on (default cpu)"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", metavar="FILE", type=Path, help="keep the tokens in it")
    what.add_argument("--expect", metavar="FILE", type=Path, help="the tokens that are right")
    parser.set_defaults(run=_devices)


def _add_layers(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "layers",
        help="every tensor of every graph, with Polygraphy",
        description="Compare ONNX Runtime and TensorRT on a bundle, layer by layer, with "
        "Polygraphy, then every lvlm op by itself. Against onnxruntime it is the lowered graph on "
        "ONNX Runtime: what lowering changes, without a GPU.",
        epilog="examples: lvlm-compare layers out/ --against tensorrt --plugins "
        "liblvlm_plugins.so · lvlm-compare layers out/ --against onnxruntime --target trt-rtx",
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path, help="folder made by lvlm-export")
    add("--against", choices=sorted(ENGINES), default="tensorrt", help="default tensorrt")
    add("--target", metavar="NAME", help="whose lowered graphs (default: by --against)")
    add("--plugins", metavar="FILE", type=Path, help="liblvlm_plugins.so, for full TensorRT")
    add("--image", metavar="PATH", type=Path, help="default: one of digits")
    add("--prompt", metavar="TEXT", default="Describe the picture.", help="what is asked")
    add("--graph", metavar="NAME", action="append", help="only this one; repeatable")
    add("--outputs-only", action="store_true", help="not the tensors in between")
    add_verify(add)
    parser.set_defaults(run=_layers)


def _checkpoint(args: argparse.Namespace) -> int:
    check_installed(EXPORTING, "export")
    check_installed(["onnxruntime"], "cpu")
    from lvlm.export.compare.with_checkpoint import compare

    return compare(args.bundle, args.model)


def _devices(args: argparse.Namespace) -> int:
    from lvlm.export.compare.between_devices import compare

    return compare(args.bundles, args.device, write=args.write, expect=args.expect)


def _layers(args: argparse.Namespace) -> int:
    check_installed(LOWERED, "export")
    check_installed(["onnxruntime"], "cpu")
    args.target = args.target or ENGINES[args.against]
    from lvlm.export.compare.between_layers import compare

    return compare(args)
