"""Choices of ``lvlm-tune`` for ``tiny-llava`` beside those of an exhaustive search, and what both
cost.

    python scripts/measure_tune.py --work /tmp/tune --samples 160 --max-loss 5% 10% --memory 32MB

Every candidate answers every sample, and every speed is measured: the exhaustive search. Then
lvlm-tune's own search runs on these figures for each limit: on the samples as they come, as the
command has it, and in other orders. What it asks for is counted by what that took when it was
measured. The same command goes on where it was cut short. Writes results.md below --work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from lvlm.calibration.datasets.evaluation_samples import EvaluationSample, read_samples
from lvlm.calibration.evaluate.answer_metrics import METRICS
from lvlm.calibration.evaluate.evaluation import EvaluationStep, plan_jobs
from lvlm.calibration.evaluate.records import RecordStore, SampleRecord
from lvlm.calibration.evaluate.variant_runner import Conditions
from lvlm.calibration.evaluate.variants import Variant
from lvlm.calibration.tune.candidates import FULL, Candidate, candidates
from lvlm.calibration.tune.limits import TuneLimits, part
from lvlm.calibration.tune.losses import LossMeter
from lvlm.calibration.tune.predictions import Load, imagined, predict
from lvlm.calibration.tune.search import Search, Trial
from lvlm.calibration.tune.shelf import ExportedShelf, Making
from lvlm.calibration.tune.speeds import SpeedRecord, Stopwatch
from lvlm.calibration.tune.tune_arguments import KEEPS, KV_KEEPS, RECIPES
from lvlm.calibration.tune.tune_cli import IMAGE_CACHE
from lvlm.core.progress import Progress, duration, size
from lvlm.export.packages import set_logging
from lvlm.runtime.engine.memory_plan import byte_size

HEAD = (
    *("limit", "best of all", "chosen", "worse by", "answers asked", "speeds", "time"),
    *("other orders: worse by, mean", "most", "by 1 % at most", "time, mean", "most"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--work", type=Path, required=True)
    add("--samples", type=int, default=160)
    add("--kinds", nargs="+", default=[], help="of questions, as lvlm-eval takes them")
    add("--recipes", nargs="+", default=list(RECIPES))
    add("--keep", nargs="+", type=float, default=list(KEEPS))
    add("--kv-keep", nargs="+", type=float, default=list(KV_KEEPS))
    add("--max-loss", nargs="*", default=["2%", "5%", "10%", "20%"])
    add("--memory", nargs="*", default=[])
    add("--new-tokens", type=int, default=64)
    add("--orders", type=int, default=20, help="of samples, beside the one they come in")
    add("--threads", type=int, default=1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    set_logging(False)
    samples = read_samples("digits", samples=args.samples, kinds=args.kinds)
    some = candidates(args.recipes, args.keep, args.kv_keep)
    search = made(some, samples, args.new_tokens, args.threads, args.work)
    everything = asked_everything(search)
    limits = {f"loss {text}": TuneLimits(max_loss=part(text)) for text in args.max_loss}
    limits |= {
        f"memory {text}": TuneLimits(memory=byte_size("--memory", text)) for text in args.memory
    }
    text = table(everything, limits, args.orders)
    (args.work / "results.md").write_text(text)
    print(text)


@dataclass(frozen=True)
class Everything:
    """The exhaustive search: ``search`` with all of its figures on disk; ``trials``: those of all
    candidates; ``ms``: milliseconds of an answer of each, the median."""

    search: Search
    trials: Mapping[Candidate, Trial]
    ms: Mapping[Candidate, float]

    def seconds(self, asked: Mapping[Candidate, int], timed: Sequence[Candidate]) -> float:
        """Seconds that so many answers and the speeds of these took."""
        speeds = [speed.seconds for one in timed if (speed := self.trials[one].speed)]
        return sum(n * self.ms[one] for one, n in asked.items()) / 1000 + sum(speeds)


def made(
    some: Sequence[Candidate],
    samples: Sequence[EvaluationSample],
    new_tokens: int,
    threads: int,
    work: Path,
) -> Search:
    """The search as the command builds it, all bundles exported; prompts one at a time, so that a
    sample's answer is the same in every order."""
    making = Making("tiny-llava", "fp32", None, 512, 1, validate=False)
    shelf = ExportedShelf(making, work / "bundles", some, False, Progress(0))
    bundles = shelf.serve(some).bundles
    load = Load(32, 1, new_tokens, 1)
    full = bundles[FULL.bundle].manifest
    trials = {}
    for one in some:
        own = full if one == FULL else imagined(full, one.made(), load)
        trials[one] = Trial(one, predict(full, own, load, IMAGE_CACHE, one.keep, one.kv_keep))
    store = RecordStore(work / "records.jsonl", SampleRecord)
    times = RecordStore(work / "speeds.jsonl", SpeedRecord)
    how = Conditions(1, 160, threads=threads)
    judge = LossMeter(samples, METRICS["accuracy"], how, store, bundles)
    stopwatch = Stopwatch(load, "cpu", threads, times, bundles)
    return Search(trials, TuneLimits(), judge, stopwatch, shelf, bundles)


def asked_everything(search: Search) -> Everything:
    """All figures of all candidates; what is on disk is not measured again."""
    some, judge, progress = list(search.trials), search.judge, Progress(2)
    with progress.stage(f"speeds of {len(some)} candidates") as stage:
        began = time.monotonic()
        speeds = search.stopwatch.speeds(some, stage)
        stage.result = f"{time.monotonic() - began:.0f} s in all"
    with progress.stage(f"{len(some)} candidates, {len(judge.samples)} samples") as stage:

        def show(step: EvaluationStep) -> None:
            if step.seconds_left is not None:
                stage.show(f"{step.job.variant.setting}, {duration(step.seconds_left)} left")

        losses = judge.losses(some, len(judge.samples), show)
    trials = {
        one: replace(trial, loss=losses[one], speed=speeds[one])
        for one, trial in search.trials.items()
    }
    ms = {one: _ms(judge, one) for one in some}
    return Everything(search, trials, ms)


def _ms(judge: LossMeter, one: Candidate) -> float:
    """The median of its answers, which other work on the machine moves least."""
    variant = Variant(judge.bundles[one.bundle], one.label, one.keep, one.kv_keep)
    (job,) = plan_jobs([(variant, judge.metric.run)], judge.samples, judge.how)
    records = [record for key in job.keys if (record := judge.store.get(key)) is not None]
    return median(r.vision_ms + r.prefill_ms + r.decode_ms for r in records)


@dataclass(frozen=True)
class Replay:
    """One search: its choice (None: nothing keeps within the limits), by how much that is worse
    than the best of all, and what it asked for as parts of the exhaustive search's: answers,
    speeds, and the time of both."""

    chosen: Trial | None
    worse: float
    answers: float
    speeds: float
    time: float


def replay(
    everything: Everything, limits: TuneLimits, samples: Sequence[EvaluationSample]
) -> Replay:
    """Run the search on the samples in this order."""
    base, all_trials = everything.search, everything.trials
    search = replace(
        base, trials=dict(base.trials), limits=limits, judge=replace(base.judge, samples=samples)
    )
    found = search.run(Progress(0, quiet=True))
    chosen = None if found.chosen is None else all_trials[found.chosen.candidate]
    asked = {t.candidate: t.loss.samples if t.loss else 0 for t in found.trials}
    timed = [t.candidate for t in found.trials if t.speed]
    return Replay(
        chosen,
        worse(chosen, best_of(list(all_trials.values()), limits), limits),
        sum(asked.values()) / (len(samples) * len(asked)),
        len(timed) / len(asked),
        everything.seconds(asked, timed)
        / everything.seconds(dict.fromkeys(asked, len(samples)), list(asked)),
    )


def best_of(trials: Sequence[Trial], limits: TuneLimits) -> Trial | None:
    """The fastest within a limit on the loss; within others the one of least loss."""
    fitting = [
        t
        for t in trials
        if (limits.memory is None or t.prediction.memory <= limits.memory)
        and (limits.max_loss is None or lost(t) <= limits.max_loss)
    ]
    if limits.max_loss is not None:
        return max(fitting, key=tokens_per_s, default=None)
    return min(fitting, key=lambda t: (lost(t), -tokens_per_s(t)), default=None)


def worse(chosen: Trial | None, best: Trial | None, limits: TuneLimits) -> float:
    """The part of the best one's tokens per second that is missing; without a limit on the loss,
    the part of the full model's quality that is lost beyond the best one's loss."""
    if best is None or chosen is None:
        return 0.0 if best is chosen else 1.0
    if limits.max_loss is None:
        return lost(chosen) - lost(best)
    return 1 - tokens_per_s(chosen) / tokens_per_s(best)


def lost(trial: Trial) -> float:
    assert trial.loss is not None
    return trial.loss.part


def tokens_per_s(trial: Trial) -> float:
    assert trial.speed is not None
    assert trial.speed.error is None, trial.speed.error
    return trial.speed.tokens_per_s


def table(everything: Everything, limits: Mapping[str, TuneLimits], orders: int) -> str:
    """A line for each limit."""
    samples, some = everything.search.judge.samples, everything.trials
    answers = everything.seconds(dict.fromkeys(some, len(samples)), [])
    speeds = everything.seconds({}, list(some))
    lines = [
        f"{len(some)} candidates, {len(samples)} samples: {answers:.0f} s of answers in all, "
        f"{speeds:.0f} s of speeds.",
        "",
        f"| {' | '.join(HEAD)} |",
        "| --- | --- | --- |" + " --: |" * (len(HEAD) - 3),
    ]
    rng = np.random.default_rng(0)
    shuffled = [[samples[i] for i in rng.permutation(len(samples))] for _ in range(orders)]
    for name, limit in limits.items():
        own = replay(everything, limit, samples)
        others = [replay(everything, limit, order) for order in shuffled]
        regrets, times = [one.worse for one in others], [one.time for one in others]
        cells = [
            name,
            said(best_of(list(some.values()), limit)),
            said(own.chosen),
            *(f"{part:.1%}" for part in (own.worse, own.answers, own.speeds, own.time)),
            *((f"{np.mean(regrets):.1%}", f"{max(regrets):.1%}") if others else ("", "")),
            f"{sum(r <= 0.01 for r in regrets)} of {orders}",
            *((f"{np.mean(times):.1%}", f"{max(times):.1%}") if others else ("", "")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    lines += ["", "| candidate | lost | tokens/s | memory |", "| --- | --: | --: | --: |"]
    for one, trial in sorted(some.items(), key=lambda item: -tokens_per_s(item[1])):
        memory = size(trial.prediction.memory)
        lines.append(f"| {one.label} | {lost(trial):.1%} | {tokens_per_s(trial):.1f} | {memory} |")
    return "\n".join(lines) + "\n"


def said(trial: Trial | None) -> str:
    if trial is None:
        return "nothing"
    return f"{trial.candidate.label}: {lost(trial):.1%} lost, {tokens_per_s(trial):.1f} tokens/s"


if __name__ == "__main__":
    main()
