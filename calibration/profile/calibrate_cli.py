"""``lvlm-calibrate``: measure how much of its cache each layer needs, for recipe prefixkv."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm.core.console import Parser, run_main

if TYPE_CHECKING:
    from lvlm.calibration.profile.measure import CalibrationJob
    from lvlm.export.budgets.calibration_samples import CalibrationSample
    from lvlm.export.budgets.prefix_profiles import PrefixProfile

KEEP = 0.2
DIGITS_SAMPLES = 64


def main(argv: Sequence[str] | None = None) -> int:
    return run_main("lvlm-calibrate", lambda: _run(make_parser().parse_args(argv)))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lvlm-calibrate",
        description="Measure how much of its cache each layer needs (PrefixKV) and write a profile "
        "that lvlm-export takes, with a plot of it beside it. A run that was cut short goes on "
        "where it stopped.",
        epilog="example: lvlm-calibrate -m tiny-llava --data digits --keep 0.2 -o profile.json",
    )
    add = parser.add_argument
    add("-m", "--model", help="alias, local folder or hub id")
    add("-o", "--output", type=Path, metavar="FILE.json", help="the profile")
    add(
        "--data",
        metavar="FILE.jsonl",
        help='lines {"image": PATH or [PATHS], "prompt": TEXT}, or digits, the built-in task '
        "(default: general questions about the images shipped with this package)",
    )
    add("--samples", type=int, metavar="N", help="how many of them to draw (default: all)")
    add("--seed", type=int, metavar="S", help="of the draw (default 0)")
    add(
        "--keep",
        type=float,
        default=KEEP,
        metavar="R",
        help=f"fraction of all cache entries that stays (default {KEEP}); the profile also holds "
        "0.05 to 0.95",
    )
    add(
        "--from-prefixkv",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="measure nothing: take PrefixKV's published budgets, files of its folder confs/, "
        "which hold what each layer evicts",
    )
    add("-r", "--recipe", default="none", help="merging to calibrate under (default: none)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the recipe; lvlm-export --help-recipe lists them",
    )
    add("--revision", help="of the hub repository: branch, tag or commit")
    add("--json", action="store_true", help="the result as JSON on stdout")
    add("-q", "--quiet", action="store_true", help="no progress, no table")
    return parser


def _run(args: argparse.Namespace) -> int:
    from lvlm.export.packages import EXPORTING, check_installed, set_environment, set_logging

    set_environment(verbose=False)
    check_installed(EXPORTING, "export")
    check_installed(["matplotlib"], "calibration")
    _check_output(args)

    from lvlm.calibration.profile.measure import STAGES, measure, plan
    from lvlm.core.progress import Progress
    from lvlm.export.budgets.prefix_search import check_keep

    set_logging(False)
    check_keep(args.keep)
    if args.from_prefixkv:
        return _published(args)
    recipe = _recipe(args)
    job = plan(args.model, args.revision, recipe, _samples(args), args.keep, args.output)
    quiet = args.quiet or args.json
    if not quiet and job.checkpoint.source != args.model:
        print(f"{args.model} is {job.checkpoint.source}", file=sys.stderr)
    progress = Progress(STAGES, quiet=quiet)
    profile = measure(job, progress)
    if args.json:
        print(json.dumps(_data(job, profile) | {"seconds": round(progress.elapsed, 2)}, indent=1))
    elif not args.quiet:
        print(_table(args, job, profile, progress.elapsed), file=sys.stderr)
    return 0


def _published(args: argparse.Namespace) -> int:
    from lvlm.calibration.profile.profile_plot import draw_profile
    from lvlm.calibration.profile.published import published
    from lvlm.core.errors import ParameterError
    from lvlm.export.summaries import layout

    measured = {"--data": args.data, "--samples": args.samples, "--seed": args.seed}
    measured |= {
        "--set": args.set or None,
        "--recipe": args.recipe if args.recipe != "none" else None,
    }
    if given := [name for name, value in measured.items() if value is not None]:
        raise ParameterError(f"{given[0]} is for measuring; leave it out with --from-prefixkv")
    profile = published(args.model, args.revision, args.from_prefixkv, args.keep)
    plot = args.output.with_suffix(".png")
    draw_profile(profile, plot)
    profile.write(args.output)
    fractions = profile.row().fractions
    if args.json:
        found = {"output": str(args.output), "plot": str(plot), "keep": profile.keep}
        print(json.dumps(found | {"fractions": fractions}, indent=1))
    elif not args.quiet:
        low, high = min(fractions), max(fractions)
        rows = {
            "profile": f"{args.output}  ({profile.layers} layers, published budgets)",
            "plot": str(plot),
            "rows": ", ".join(f"{row.keep:.1%} kept" for row in profile.rows),
            "budgets": f"{low:.1%} of layer {fractions.index(low)} to {high:.1%} of layer "
            f"{fractions.index(high)} where {profile.keep:.1%} of all stays",
        }
        print(f"{layout(rows)}\nnext: {_next(args)} -o out/", file=sys.stderr)
    return 0


def _check_output(args: argparse.Namespace) -> None:
    """Raise for mistakes that are known before anything is loaded."""
    from lvlm.core.errors import ExportError, ParameterError
    from lvlm.core.output import check_place

    if args.model is None:
        raise ParameterError("which model? give -m (tiny-llava is shipped with this package)")
    if args.output is None:
        raise ParameterError("where to? give -o FILE.json")
    output: Path = args.output
    if output.suffix != ".json":
        raise ParameterError(f"-o {output}: name a file ending in .json")
    for path in (output, output.with_suffix(".png")):
        if path.exists():
            raise ExportError(f"{path} exists; give another -o or remove it")
    check_place("-o", output, ExportError)


def _recipe(args: argparse.Namespace) -> Any:
    from lvlm.export.recipes.recipe import known_recipe, parse_settings

    return parse_settings(known_recipe(args.recipe), args.set)


def _samples(args: argparse.Namespace) -> list[CalibrationSample]:
    from lvlm.core.errors import ParameterError
    from lvlm.export.budgets.calibration_samples import builtin_samples, choose, read_samples

    if args.samples is None and args.seed is not None and args.data != "digits":
        raise ParameterError("--seed has no effect where all samples are used; add --samples N")
    seed = 0 if args.seed is None else args.seed
    if seed < 0:
        raise ParameterError(f"--seed is {seed}; give 0 or more")
    if args.data == "digits":
        return _digits(DIGITS_SAMPLES if args.samples is None else args.samples, seed)
    if args.data is None:
        return choose(builtin_samples(), args.samples, seed, "there are built in")
    return choose(read_samples(args.data), args.samples, seed, f"{args.data} holds")


def _digits(count: int, seed: int) -> list[CalibrationSample]:
    from lvlm.core.errors import ParameterError
    from lvlm.export.budgets.calibration_samples import CalibrationSample
    from lvlm.export.packages import check_installed

    check_installed(["sklearn"], "calibration")
    from lvlm.calibration.datasets import digits

    if count < 1:
        raise ParameterError(f"{count} samples are asked for; give 1 or more")
    return [
        CalibrationSample(
            tuple(scene.image for scene in asked.scenes),
            asked.question,
            f"digits, sample {number}",
        )
        for number, asked in enumerate(digits.samples("train", count, seed=seed), 1)
    ]


def _data(job: CalibrationJob, profile: PrefixProfile) -> dict[str, Any]:
    return {
        "output": str(job.output),
        "plot": str(job.plot),
        "model": job.checkpoint.source,
        "recipe": {"name": profile.recipe.name, "parameters": profile.recipe.parameters},
        "keep": profile.keep,
        "samples": profile.data.samples,
        "fractions": profile.row().fractions,
        "std": profile.spread.std,
    }


def _table(
    args: argparse.Namespace, job: CalibrationJob, profile: PrefixProfile, seconds: float
) -> str:
    from lvlm.export.summaries import layout

    fractions = profile.row().fractions
    low, high = min(fractions), max(fractions)
    rows = {
        "profile": f"{job.output}  ({profile.layers} layers, {profile.data.samples} samples)",
        "plot": str(job.plot),
        "budgets": f"{low:.1%} of layer {fractions.index(low)} to {high:.1%} of layer "
        f"{fractions.index(high)} where {profile.keep:.0%} of all stays",
        "spread": f"standard deviation over the samples {max(profile.spread.std):.1%} at most",
        "took": f"{seconds:.1f} s",
    }
    return f"{layout(rows)}\nnext: {_next(args)} -o out/"


def _next(args: argparse.Namespace) -> str:
    """The export that takes this profile, under the same merging."""
    settings = [*args.set, "kv=prefixkv", f"kv_profile={args.output}"]
    if args.recipe == "none":
        settings = [f"profile={args.output}"]
    recipe = "prefixkv" if args.recipe == "none" else args.recipe
    revision = ["--revision", args.revision] if args.revision else []
    pairs = [part for setting in settings for part in ("--set", setting)]
    return shlex.join(["lvlm-export", "-m", args.model, *revision, "-r", recipe, *pairs])
