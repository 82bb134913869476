"""``lvlm-export``: a checkpoint and a recipe in, a bundle out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm.runtime.console import Parser, run_main

if TYPE_CHECKING:
    from lvlm.export.exporter import Report
    from lvlm.export.plan import Options, Plan
    from lvlm.export.recipes._base import Recipe

DTYPES = ("fp32", "fp16", "bf16")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return run_main("lvlm-export", lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
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
        "--max-text-len",
        type=int,
        default=2048,
        metavar="N",
        help="text tokens of prompt and answer together (default 2048)",
    )
    parser.add_argument(
        "--max-images", type=int, default=1, metavar="N", help="pictures per prompt (default 1)"
    )
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="NAME",
        help="also write graphs lowered for this engine (see --list-targets)",
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
    parser.add_argument("--list-models", action="store_true", help="list families and aliases")
    parser.add_argument("--list-targets", action="store_true", help="list what --target takes")
    return parser


def _run(args: argparse.Namespace) -> int:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if args.verbose else "1")
    require(["torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors"], "export")
    if args.help_recipe is not None or args.list_models or args.list_targets:
        from lvlm.export import listings

        if args.list_models:
            print(listings.models())
        if args.list_targets:
            print(listings.targets())
        if args.help_recipe is not None:
            name = args.help_recipe or (args.recipe if args.recipe != "none" else "")
            print(listings.recipe(name) if name else listings.recipes())
        return 0
    options = _options(args)
    if options.validate:
        require(["onnxruntime"], "cpu")

    from lvlm.export.exporter import export, stages
    from lvlm.export.plan import check_output, make_plan
    from lvlm.export.progress import Progress

    check_output(options.output)
    quiet = args.quiet or args.json
    set_logging(args.verbose)
    plan = make_plan(options)
    if not quiet and plan.checkpoint.source != args.model:
        print(f"{args.model} is {plan.checkpoint.source}", file=sys.stderr)
    if args.dry_run:
        print(json.dumps(_plan_data(plan), indent=1) if args.json else _plan_table(plan))
        return 0
    progress = Progress(stages(options), quiet=quiet)
    report = export(plan, progress)
    if args.json:
        print(json.dumps(_report_data(report), indent=1))
    elif not args.quiet:
        print(_report_table(report), file=sys.stderr)
    return 0


def require(packages: Sequence[str], extra: str) -> None:
    from importlib.util import find_spec

    from lvlm.runtime.errors import ExportError

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{', '.join(missing)} not installed; pip install lvlm-deploy[{extra}]"
            + (" (or export with --no-validate)" if extra == "cpu" else "")
        )


def _options(args: argparse.Namespace) -> Options:
    from lvlm.runtime.discovery import discover, nearest
    from lvlm.runtime.errors import ParameterError

    if args.model is None:
        raise ParameterError("which model? give -m (tiny-llava is shipped with this package)")
    if args.output is None:
        raise ParameterError("where to? give -o FOLDER")
    from lvlm.export.plan import Options
    from lvlm.export.recipes._base import parse_settings

    targets = discover("lvlm.export.targets", "TARGET")
    for name in args.target:
        if name not in targets:
            raise nearest("target", name, targets)
    return Options(
        model=args.model,
        recipe=parse_settings(known_recipe(args.recipe), args.set),
        output=args.output,
        dtype=args.dtype,
        revision=args.revision,
        max_text_len=args.max_text_len,
        max_images=args.max_images,
        validate=not args.no_validate,
        targets=tuple(targets[name] for name in dict.fromkeys(args.target)),
    )


def known_recipe(name: str) -> type[Recipe]:
    from lvlm.runtime.discovery import discover, nearest

    known: dict[str, type[Recipe]] = discover("lvlm.export.recipes", "RECIPE")
    if name not in known:
        raise nearest("recipe", name, known)
    return known[name]


def set_logging(verbose: bool) -> None:
    import logging
    import warnings

    if verbose:
        logging.basicConfig(level=logging.INFO)
        logging.getLogger("lvlm").setLevel(logging.DEBUG)
        return
    warnings.simplefilter("ignore")
    for name in ("torch", "transformers", "onnxscript", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _plan_data(plan: Plan) -> dict[str, Any]:
    from lvlm.export.graphs import graph_names

    return {
        "model": plan.checkpoint.source,
        "family": plan.family.name,
        "recipe": {"name": plan.recipe.name, "parameters": plan.recipe.parameters()},
        "dtype": str(plan.dtype).removeprefix("torch."),
        "output": str(plan.options.output),
        "graphs": [f"{name}.onnx" for name in graph_names(plan.recipe)],
        "weight_bytes": plan.weight_bytes,
        "image_tokens": plan.images.tokens,
        "image_tokens_per_layer": plan.cache.image_tokens,
        "capacity": dataclasses.asdict(plan.cache.capacity),
        "cache_bytes_per_sequence": plan.cache.bytes,
        "peak_memory_estimate_bytes": plan.peak_bytes,
    }


def _plan_table(plan: Plan) -> str:
    from lvlm.export.graphs import graph_names
    from lvlm.export.progress import size

    graphs = graph_names(plan.recipe)

    return layout(
        {
            "model": f"{plan.checkpoint.source} (family {plan.family.name})",
            "recipe": _recipe_line(plan),
            "would write": f"{plan.options.output}/ with graphs {', '.join(graphs)}",
            "weights": f"{size(plan.weight_bytes)} as {str(plan.dtype).removeprefix('torch.')}",
            "image tokens": _pyramid(plan),
            "cache": f"{size(plan.cache.bytes)} per sequence at full capacity",
            "peak memory": f"about {size(plan.peak_bytes)} during export (estimate)",
        }
    )


def _report_table(report: Report) -> str:
    from lvlm.export.progress import size
    from lvlm.export.validation import table

    plan = report.plan
    total = sum(f.bytes for f in report.manifest.files.values())
    rows = {
        "bundle": f"{report.output}/  {size(total)} in {len(report.manifest.files)} files",
        "recipe": _recipe_line(plan),
        "image tokens": _pyramid(plan),
        "cache": f"{size(plan.cache.bytes)} per sequence at full capacity",
        "took": f"{report.seconds:.1f} s",
        "validation": report.manifest.validation,
    }
    lines = [layout(rows)]
    if report.validation:
        lines.append(table(report.validation))
    lines.append(f'next: lvlm-run {report.output} --image PICTURE "QUESTION"')
    return "\n".join(lines)


def _report_data(report: Report) -> dict[str, Any]:
    return _plan_data(report.plan) | {
        "seconds": round(report.seconds, 2),
        "files": {name: f.bytes for name, f in report.manifest.files.items()},
        "validation": report.manifest.validation,
        "checks": [dataclasses.asdict(c) | {"passed": c.passed} for c in report.validation],
    }


def _recipe_line(plan: Plan) -> str:
    values = ", ".join(f"{k}={v}" for k, v in plan.recipe.parameters().items() if v is not None)
    return f"{plan.recipe.name} ({values})" if values else plan.recipe.name


def _pyramid(plan: Plan) -> str:
    counts, steps = plan.cache.image_tokens, [str(plan.cache.image_tokens[0])]
    for layer in range(1, len(counts)):
        if counts[layer] != counts[layer - 1]:
            steps.append(f"{counts[layer]} from block {layer}")
    mean = sum(counts) / len(counts) / counts[0]
    return " → ".join(steps) + f" (mean over layers {mean:.0%})"


def layout(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"  {name:{width}}  {value}" for name, value in rows.items())
