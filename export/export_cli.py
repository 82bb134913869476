"""``lvlm-export``: a checkpoint and a recipe in, a bundle out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lvlm.core.console import Parser, run_main
from lvlm.export.dtypes import DTYPES
from lvlm.export.packages import EXPORTING, check_installed, set_environment, set_logging

if TYPE_CHECKING:
    from lvlm.export.export_options import ExportOptions

WEIGHTS = ("int8", "int4")
CACHES = ("fp16", "int8")


def main(argv: Sequence[str] | None = None) -> int:
    return run_main("lvlm-export", lambda: _run(make_parser().parse_args(argv)))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lvlm-export",
        description="Export a vision-language model with token merging built into its graphs.",
        epilog="example: lvlm-export --model tiny-llava --recipe lightvlm -o out/",
    )
    parser.add_argument("-m", "--model", help="alias, local folder or hub id")
    parser.add_argument("-r", "--recipe", default="none", help="default: none")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the recipe; --help-recipe lists them",
    )
    parser.add_argument("-o", "--output", type=Path, help="the bundle's folder")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="quantize the language model's weights, block-wise; it still computes in --dtype",
    )
    parser.add_argument(
        "--block-size",
        type=_block_size,
        metavar="N",
        help="weights that share a scale: 16, 32 (default), 64, 128 or 256; of int8 also all of an "
        "output",
    )
    parser.add_argument(
        "--calibrate",
        nargs="?",
        const="",
        metavar="SAMPLES",
        help="round weights so that layers keep their outputs on samples (GPTQ): those of a file, "
        'one {"image", "prompt"} a line, or built-in ones; with --weights int4',
    )
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="store the weights of a quantized checkpoint in --dtype, or as --weights says",
    )
    parser.add_argument(
        "--lora",
        type=Path,
        metavar="DIR",
        help="an adapter as PEFT saves it, to be merged into the weights",
    )
    parser.add_argument(
        "--cache",
        choices=CACHES,
        help="keep keys and values in fp16, or in 8 bits with a scale each: half or a quarter of "
        "the cache of an fp32 bundle (default: --dtype)",
    )
    parser.add_argument(
        "--max-text-len",
        type=int,
        default=2048,
        metavar="N",
        help="text tokens of prompt and answer together (default 2048)",
    )
    parser.add_argument(
        "--max-images", type=int, default=1, metavar="N", help="images per prompt (default 1)"
    )
    parser.add_argument(
        "--max-image-tokens",
        type=int,
        metavar="N",
        help="scale images down to at most N tokens each (default: the checkpoint's own limit)",
    )
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="NAME",
        help="also write graphs lowered for this engine (see --list-targets)",
    )
    parser.add_argument(
        "--sessions",
        action="store_true",
        help="write the graph that lets a conversation keep its compressed cache from turn to turn "
        "(engine.session(), lvlm-run --chat --session); with recipe none it is always there",
    )
    parser.add_argument("--revision", help="of the hub repository: branch, tag or commit")
    parser.add_argument(
        "--no-validate", action="store_true", help="do not compare with the checkpoint"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print sizes, write nothing"
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no table")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="what torch and its exporter report, too"
    )
    parser.add_argument(
        "--help-recipe",
        nargs="?",
        const="",
        metavar="RECIPE",
        help="list the recipes, or one recipe's parameters",
    )
    parser.add_argument(
        "--list-models", action="store_true", help="list families, aliases, and what they take"
    )
    parser.add_argument("--list-targets", action="store_true", help="list what --target takes")
    return parser


def _block_size(text: str) -> int | str:
    return text if text == "all" else int(text)


def _run(args: argparse.Namespace) -> int:
    set_environment(args.verbose)
    if args.help_recipe is not None or args.list_models or args.list_targets:
        return _list(args)
    check_installed(EXPORTING, "export")
    options = _options(args)
    if options.weights:
        check_installed(["onnxruntime"], "cpu", " (or leave --weights out)")  # its quantizer
    if options.validate:
        check_installed(["onnxruntime"], "cpu", " (or export with --no-validate)")

    from lvlm.core.progress import Progress
    from lvlm.export.export_plan import make_plan
    from lvlm.export.exporter import export, stages
    from lvlm.export.machine_check import check_machine
    from lvlm.export.summaries import plan_data, plan_table, report_data, report_table

    quiet = args.quiet or args.json
    set_logging(args.verbose)
    plan = make_plan(options, weights=not args.dry_run, quiet=quiet)
    if not quiet and plan.checkpoint.source != args.model:
        print(f"{args.model} is {plan.checkpoint.source}", file=sys.stderr)
    if args.dry_run:
        print(json.dumps(plan_data(plan), indent=1) if args.json else plan_table(plan))
        check_machine(plan)
        return 0
    progress = Progress(stages(plan), quiet=quiet)
    report = export(plan, progress)
    if args.json:
        print(json.dumps(report_data(report), indent=1))
    elif not args.quiet:
        print(report_table(report), file=sys.stderr)
    return 0


def _list(args: argparse.Namespace) -> int:
    from lvlm.export.stand_ins import stand_ins

    with stand_ins():
        from lvlm.export import listings

        if args.list_models:
            print(listings.models())
        if args.list_targets:
            print(listings.targets())
        if args.help_recipe is not None:
            name = args.help_recipe or (args.recipe if args.recipe != "none" else "")
            print(listings.recipe(name) if name else listings.recipes())
    return 0


def _options(args: argparse.Namespace) -> ExportOptions:
    from lvlm.core.discovery import discover, nearest
    from lvlm.core.errors import ParameterError
    from lvlm.export.places import check_output

    if args.model is None:
        raise ParameterError("which model? give -m (tiny-llava is shipped with this package)")
    if args.output is None:
        raise ParameterError("where to? give -o FOLDER")
    check_output(args.output)
    from lvlm.export.export_options import ExportOptions
    from lvlm.export.recipes.recipe import known_recipe, parse_settings

    targets = discover("lvlm.export.targets", "TARGET")
    for name in args.target:
        if name not in targets:
            raise nearest("target", name, targets)
    return ExportOptions(
        model=args.model,
        recipe=parse_settings(known_recipe(args.recipe), args.set),
        output=args.output,
        dtype=args.dtype,
        weights=args.weights,
        block_size=args.block_size,
        calibrate=args.calibrate,
        dequantize=args.dequantize,
        lora=args.lora,
        cache=args.cache,
        revision=args.revision,
        max_text_len=args.max_text_len,
        max_images=args.max_images,
        max_image_tokens=args.max_image_tokens,
        validate=not args.no_validate,
        sessions=args.sessions,
        targets=tuple(targets[name] for name in dict.fromkeys(args.target)),
    )
