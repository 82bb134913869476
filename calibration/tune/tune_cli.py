"""``lvlm-tune``: which recipe, for this model, these samples and these limits."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lvlm.calibration.evaluate.eval_arguments import MAX_NEW_TOKENS, MAX_TEXT_LEN
from lvlm.calibration.tune.tune_arguments import KEEPS, KV_KEEPS, RECIPES, parser
from lvlm.core.console import run_main

if TYPE_CHECKING:
    from lvlm.calibration.datasets.evaluation_samples import EvaluationSample
    from lvlm.calibration.tune.candidates import Candidate
    from lvlm.calibration.tune.limits import TuneLimits
    from lvlm.calibration.tune.predictions import Load
    from lvlm.calibration.tune.search import Choice, Trial
    from lvlm.calibration.tune.shelf import Shelf
    from lvlm.core.progress import Progress

NOTHING = 2  # the status where nothing keeps within the limits
EXPORT_FLAGS = ("recipes", "set", "dtype", "revision", "max_text_len", "no_validate")
SPEEDS = "speeds.jsonl"
IMAGE_CACHE = "64MB"  # what an engine keeps of images unless it is told otherwise


def main(argv: Sequence[str] | None = None) -> int:
    return run_main("lvlm-tune", lambda: _run(parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from lvlm.calibration.datasets.evaluation_samples import listing, read_samples

    if args.list_data:
        print(listing())
        return 0
    limits = _checked(args)

    from lvlm.calibration.evaluate.study import claim
    from lvlm.calibration.tune.tune_report import write_choice
    from lvlm.core.progress import Progress
    from lvlm.export.packages import EXPORTING, check_installed, set_logging
    from lvlm.runtime.backends import open_backend

    packages = ["matplotlib", *(["rouge_score"] if args.metric == "rouge" else [])]
    check_installed(packages, "calibration")
    if args.model:
        check_installed(EXPORTING, "export")
    open_backend(args.device, threads=args.threads)
    samples = read_samples(
        args.data, layout=args.format, images=args.images, samples=args.samples, kinds=args.kinds
    )
    set_logging(False)
    progress = Progress(0, quiet=args.quiet)
    shelf, candidates = _shelf(args, samples, progress)
    claim(args.output, _settings(args, samples), SPEEDS)
    try:
        choice = _searched(args, limits, samples, shelf, candidates, progress)
    except KeyboardInterrupt:
        if not args.quiet:
            print("\nstopped; the same command goes on from here", file=sys.stderr)
        raise
    command = None if choice.chosen is None else shelf.command(choice.chosen.candidate)
    table = write_choice(
        args.output, choice, command, _settings(args, samples), _about(args, samples)
    )
    if not args.quiet:
        print(table, end="")
        print(f"wrote results.md, results.json and results.png in {args.output}", file=sys.stderr)
    if command is None:
        print(f"lvlm-tune: error: {_nothing(choice, limits)}", file=sys.stderr)
        return NOTHING
    return 0


def _checked(args: argparse.Namespace) -> TuneLimits:
    """Raise for mistakes that are known before anything is read."""
    from lvlm.calibration.tune.limits import TuneLimits, milliseconds, part
    from lvlm.core.errors import ParameterError
    from lvlm.runtime.engine.memory_plan import byte_size

    if args.output is None:
        raise ParameterError("where to? give -o FOLDER")
    if args.data is None:
        raise ParameterError("which samples? give --data digits (built in), or a file")
    if bool(args.model) == bool(args.bundles):
        raise ParameterError("choose for what? give -m MODEL, or bundles, one of them of none")
    if args.bundles:
        for name in EXPORT_FLAGS:
            if getattr(args, name):
                flag = "--" + name.replace("_", "-")
                raise ParameterError(f"{flag} is for candidates to export; leave it out")
    for name in ("batch", "max_new_tokens", "threads", "concurrency", "prompt_tokens",
                 "new_tokens", "max_text_len"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ParameterError(f"--{name.replace('_', '-')} is {value}; give 1 or more")
    room, wanted = args.max_text_len or MAX_TEXT_LEN, args.prompt_tokens + args.new_tokens
    if args.model and wanted > room:
        raise ParameterError(
            f"--prompt-tokens and --new-tokens together are {wanted}, more than --max-text-len "
            f"{room}; raise that, or ask for less"
        )
    if args.memory is None and args.ttft is None and args.max_loss is None:
        raise ParameterError(
            "within what limits? give --memory 4GB, --ttft 300ms or --max-loss 1%; without any, "
            "recipe none loses the least"
        )
    return TuneLimits(
        None if args.memory is None else byte_size("--memory", args.memory),
        None if args.ttft is None else milliseconds(args.ttft),
        None if args.max_loss is None else part(args.max_loss),
    )


def _shelf(
    args: argparse.Namespace, samples: Sequence[EvaluationSample], progress: Progress
) -> tuple[Shelf, list[Candidate]]:
    """The source of bundles, and all that is to be tried."""
    from lvlm.calibration.evaluate.study import BUNDLES
    from lvlm.calibration.evaluate.variants import Bundle
    from lvlm.calibration.tune.candidates import candidates
    from lvlm.calibration.tune.shelf import (
        ExportedShelf,
        Making,
        given_candidates,
        given_shelf,
    )

    keeps, kv_keeps = args.keep or KEEPS, args.kv_keep or KV_KEEPS
    if args.bundles:
        given = given_shelf([Bundle.read(path) for path in args.bundles])
        return given, given_candidates(given, keeps, kv_keeps)
    found = candidates(args.recipes or RECIPES, keeps, kv_keeps, args.set or [])
    making = Making(
        args.model,
        args.dtype,
        args.revision,
        args.max_text_len or MAX_TEXT_LEN,
        _images(samples),
        not args.no_validate,
    )
    lenient = not args.recipes
    return ExportedShelf(making, args.output / BUNDLES, found, lenient, progress), found


def _searched(
    args: argparse.Namespace,
    limits: TuneLimits,
    samples: Sequence[EvaluationSample],
    shelf: Shelf,
    candidates: Sequence[Candidate],
    progress: Progress,
) -> Choice:
    from lvlm.bench.machine import cores
    from lvlm.calibration.evaluate.answer_metrics import METRICS
    from lvlm.calibration.evaluate.records import RecordStore, SampleRecord
    from lvlm.calibration.evaluate.study import RECORDS
    from lvlm.calibration.evaluate.variant_runner import Conditions
    from lvlm.calibration.tune.candidates import FULL
    from lvlm.calibration.tune.losses import LossMeter
    from lvlm.calibration.tune.search import Search
    from lvlm.calibration.tune.speeds import SpeedRecord, Stopwatch

    bundles = shelf.serve([FULL]).bundles
    threads = args.threads or cores()
    how = Conditions(args.batch, args.max_new_tokens or MAX_NEW_TOKENS, args.device, threads)
    store = RecordStore(args.output / RECORDS, SampleRecord)
    times = RecordStore(args.output / SPEEDS, SpeedRecord)
    load = _load(args, samples)
    search = Search(
        trials=_trials(candidates, shelf, load),
        limits=limits,
        judge=LossMeter(samples, METRICS[args.metric], how, store, bundles),
        stopwatch=Stopwatch(load, args.device, threads, times, bundles),
        shelf=shelf,
        bundles=bundles,
    )
    return search.run(progress)


def _load(args: argparse.Namespace, samples: Sequence[EvaluationSample]) -> Load:
    from lvlm.calibration.tune.predictions import Load

    return Load(args.prompt_tokens, _images(samples), args.new_tokens, args.concurrency)


def _images(samples: Sequence[EvaluationSample]) -> int:
    return max(1, *(len(sample.images) for sample in samples))


def _trials(candidates: Sequence[Candidate], shelf: Shelf, load: Load) -> dict[Candidate, Trial]:
    """Predictions of each; those that cannot be for this model are out."""
    from lvlm.calibration.tune.candidates import FULL
    from lvlm.calibration.tune.predictions import NOTHING_KNOWN, imagined, predict
    from lvlm.calibration.tune.search import Trial
    from lvlm.core.errors import ParameterError

    bundles = shelf.serve([FULL]).bundles
    full, found = bundles[FULL.bundle].manifest, {}
    for one in candidates:
        try:
            there = bundles.get(one.bundle)
            own = imagined(full, one.made(), load) if there is None else there.manifest
            predicted = predict(full, own, load, IMAGE_CACHE, one.keep, one.kv_keep)
            found[one] = Trial(one, predicted)
        except ParameterError as error:
            if one == FULL:
                raise
            found[one] = Trial(one, NOTHING_KNOWN, out=str(error))
    return found


def _settings(args: argparse.Namespace, samples: Sequence[EvaluationSample]) -> dict[str, Any]:
    """Everything that results depend on, by the names of the flags."""
    from lvlm.calibration.evaluate.records import key_of

    plain = (
        *("model", "memory", "ttft", "max_loss", "concurrency", "prompt_tokens", "new_tokens"),
        *("metric", "batch", "recipes", "set", "keep", "kv_keep", "device", "threads", "dtype"),
        *("revision", "max_text_len", "max_new_tokens"),
    )
    return {
        "data": [args.data, key_of(samples=[sample.digest() for sample in samples])],
        "samples": len(samples),
        "bundles": [str(path) for path in args.bundles],
        **{name: getattr(args, name) for name in plain},
    }


def _about(args: argparse.Namespace, samples: Sequence[EvaluationSample]) -> str:
    limits = {"memory": args.memory, "first token": args.ttft, "loss": args.max_loss}
    within = ", ".join(f"{what} {limit}" for what, limit in limits.items() if limit is not None)
    return (
        f"Within {within}: {len(samples)} samples of {args.data}, {args.metric}; speed with "
        f"{args.concurrency} at a time, {args.prompt_tokens} text tokens and {_images(samples)} "
        f"image(s) each, {args.new_tokens} new tokens; on {args.device}."
    )


def _nothing(choice: Choice, limits: TuneLimits) -> str:
    """The nearest candidates to limits that nothing keeps."""
    from lvlm.core.progress import size

    parts = []
    if limits.memory is not None:
        smallest = min(trial.prediction.memory for trial in choice.trials)
        parts.append(f"the least memory is {size(smallest)}")
    if limits.ttft_ms is not None:
        times = [t.speed.ttft_ms for t in choice.trials if t.speed and t.speed.error is None]
        parts.append(f"the earliest first token comes after {min(times):.0f} ms" if times else "")
    why = "; ".join(filter(None, parts))
    return f"nothing keeps within these limits{': ' + why if why else ''}; allow more"
