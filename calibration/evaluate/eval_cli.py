"""``lvlm-eval``: quality of bundles on a data set, beside the cache and the time they take."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lvlm.calibration.evaluate.eval_arguments import MAX_NEW_TOKENS, MAX_TEXT_LEN, METRICS, parser
from lvlm.core.console import run_main

if TYPE_CHECKING:
    from lvlm.calibration.datasets.evaluation_samples import EvaluationSample
    from lvlm.calibration.evaluate.answer_metrics import AnswerMetric
    from lvlm.calibration.evaluate.variants import Bundle
    from lvlm.core.progress import Progress

# Flags that shape the bundles made from --recipes, and nothing else
EXPORT_FLAGS = ("set", "dtype", "revision", "max_text_len", "no_validate")


def main(argv: Sequence[str] | None = None) -> int:
    return run_main("lvlm-eval", lambda: _run(parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if args.list_data:
        from lvlm.calibration.datasets.evaluation_samples import listing

        print(listing())
        return 0
    _check(args)
    metrics = _metrics(args)

    from lvlm.calibration.datasets.evaluation_samples import read_samples
    from lvlm.calibration.evaluate.study import Study, write_results
    from lvlm.calibration.evaluate.variant_runner import Conditions
    from lvlm.calibration.evaluate.variants import Bundle, variants
    from lvlm.core.progress import Progress
    from lvlm.export.packages import set_logging
    from lvlm.runtime.backends import open_backend

    open_backend(args.device, threads=args.threads)
    samples = read_samples(
        args.data, layout=args.format, images=args.images, samples=args.samples, kinds=args.kinds
    )
    folders = {p.resolve(): p for p in args.bundles}.values()
    given = [Bundle.read(path, verify=args.verify) for path in folders]
    reference = _reference(args, metrics, given)
    if not args.recipes:
        variants(given, args.keep, args.kv_keep)
    settings = _settings(args, metrics, samples, [*given, *reference])
    set_logging(False)
    progress = Progress(0, quiet=args.quiet)
    try:
        bundles = given + _made(args, samples, settings, progress)
        how = Conditions(
            args.batch,
            args.max_new_tokens or MAX_NEW_TOKENS,
            args.device,
            args.threads,
            args.system,
        )
        rows = variants(bundles, args.keep, args.kv_keep)
        study = Study(rows, reference or bundles, samples, metrics, how)
        found = study.run(args.output, progress)
    except KeyboardInterrupt:
        if not args.quiet:
            print("\nstopped; the same command goes on from here", file=sys.stderr)
        raise
    table = write_results(
        args.output, found, metrics, settings, _about(args, samples), timings=not args.no_timings
    )
    if not args.quiet:
        print(table, end="")
        print(f"wrote results.md, results.json and results.png in {args.output}", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise for mistakes that are known before anything is read."""
    from lvlm.core.errors import ParameterError

    if args.output is None:
        raise ParameterError("where to? give -o FOLDER")
    if args.data is None:
        raise ParameterError("which samples? give --data digits (built in), or a file")
    if bool(args.model) != bool(args.recipes):
        lacks = "-m MODEL" if args.recipes else "--recipes none,lightvlm, say"
        raise ParameterError(f"-m and --recipes make bundles together; add {lacks}")
    if not args.bundles and not args.recipes:
        raise ParameterError("what to evaluate? give bundles, or -m MODEL --recipes none,lightvlm")
    if not args.recipes:
        for name in EXPORT_FLAGS:
            if getattr(args, name):
                flag = "--" + name.replace("_", "-")
                raise ParameterError(f"{flag} is for bundles made from --recipes; leave it out")
    from lvlm.export.stand_ins import stand_ins

    with stand_ins():
        from lvlm.export.recipes.recipe import known_recipe

        for name in args.recipes:
            known_recipe(name)
    for name in ("batch", "max_new_tokens", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ParameterError(f"--{name.replace('_', '-')} is {value}; give 1 or more")


def _metrics(args: argparse.Namespace) -> list[AnswerMetric]:
    from lvlm.calibration.evaluate.answer_metrics import METRICS as KNOWN
    from lvlm.core.discovery import nearest
    from lvlm.core.errors import ParameterError
    from lvlm.export.packages import check_installed

    names = args.metrics or METRICS.split(",")
    for name in names:
        if name not in KNOWN:
            raise nearest("metric", name, KNOWN)
    chosen = [metric for name, metric in KNOWN.items() if name in names]
    if args.max_new_tokens is not None and all(m.run != "greedy" for m in chosen):
        raise ParameterError("--max-new-tokens has no effect on ppl, which takes the answers given")
    against_full = any(m.against_full for m in chosen)
    if args.reference is not None and not against_full:
        raise ParameterError("--reference has no effect without the metric rouge")
    check_installed(["matplotlib", *(["rouge_score"] if against_full else [])], "calibration")
    return chosen


def _reference(
    args: argparse.Namespace, metrics: Sequence[AnswerMetric], given: Sequence[Bundle]
) -> list[Bundle]:
    """The bundle of --reference, or none; ParameterError if there is no full cache anywhere."""
    from lvlm.calibration.evaluate.variants import Bundle
    from lvlm.core.errors import ParameterError

    if args.reference is not None:
        bundle = Bundle.read(args.reference, verify=args.verify)
        if not bundle.is_full:
            raise ParameterError(
                f"--reference {args.reference} does not keep the full cache; give a bundle of "
                "recipe none"
            )
        return [bundle]
    full = "none" in args.recipes or any(bundle.is_full for bundle in given)
    if any(m.against_full for m in metrics) and not full:
        raise ParameterError(
            "rouge compares with the full cache; add none to --recipes, give its bundle with "
            "--reference, or choose other --metrics"
        )
    return []


def _made(
    args: argparse.Namespace,
    samples: Sequence[EvaluationSample],
    settings: dict[str, Any],
    progress: Progress,
) -> list[Bundle]:
    """The bundles of --recipes. Takes the output folder as soon as nothing is wrong with them."""
    from lvlm.calibration.evaluate.study import BUNDLES, claim

    if not args.recipes:
        claim(args.output, settings)
        return []
    from lvlm.export.packages import EXPORTING, check_installed

    check_installed(EXPORTING, "export")
    from lvlm.calibration.evaluate.recipe_bundles import make, order, parse_recipes

    orders = order(
        parse_recipes(args.recipes, args.set or [], args.keep, args.kv_keep),
        args.output / BUNDLES,
        model=args.model,
        dtype=args.dtype,
        revision=args.revision,
        max_text_len=MAX_TEXT_LEN if args.max_text_len is None else args.max_text_len,
        max_images=max(1, *(len(sample.images) for sample in samples)),
        validate=not args.no_validate,
    )
    claim(args.output, settings)
    progress.stages += sum(not wanted.is_there for wanted in orders)
    return make(orders, progress)


def _settings(
    args: argparse.Namespace,
    metrics: Sequence[AnswerMetric],
    samples: Sequence[EvaluationSample],
    bundles: Sequence[Bundle],
) -> dict[str, Any]:
    """Everything that results depend on, by the names of the flags."""
    from lvlm.calibration.evaluate.records import key_of

    plain = (
        *("format", "kinds", "keep", "kv_keep", "batch", "device", "threads", "system", "model"),
        *("recipes", "set", "dtype", "revision", "max_text_len"),
    )
    return {
        "data": [args.data, key_of(samples=[sample.digest() for sample in samples])],
        "samples": len(samples),
        "metrics": [metric.name for metric in metrics],
        "max_new_tokens": args.max_new_tokens or MAX_NEW_TOKENS,
        "bundles": {bundle.label: bundle.digest for bundle in bundles},
        "reference": None if args.reference is None else str(args.reference),
        **{name: getattr(args, name) for name in plain},
    }


def _about(args: argparse.Namespace, samples: Sequence[EvaluationSample]) -> str:
    kinds = f" ({', '.join(args.kinds)})" if args.kinds else ""
    together = f", {args.batch} prompts at a time" if args.batch > 1 else ""
    return (
        f"{len(samples)} samples of {args.data}{kinds}; greedy answers of up to "
        f"{args.max_new_tokens or MAX_NEW_TOKENS} tokens; on {args.device}{together}."
    )
