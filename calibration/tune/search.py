"""The search: predictions first, then samples and times for ever fewer candidates, then a choice.

With a limit on what may be lost, the fastest of those within it is chosen; without one, that of
least loss within the others, and of equal ones the fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lvlm.calibration.datasets.evaluation_samples import DataError
from lvlm.calibration.evaluate.evaluation import EvaluationStep
from lvlm.calibration.evaluate.variants import Bundle
from lvlm.calibration.tune.candidates import FULL, Candidate
from lvlm.calibration.tune.halving import left, rounds
from lvlm.calibration.tune.limits import TuneLimits
from lvlm.calibration.tune.losses import Loss, LossMeter
from lvlm.calibration.tune.predictions import Prediction
from lvlm.calibration.tune.shelf import Key, Shelf
from lvlm.calibration.tune.speeds import SpeedRecord, Stopwatch
from lvlm.core.progress import Progress, duration, size

TIMED = 12  # candidates whose speed is measured; that of more is predicted
DOUBT = 1.5  # times as fast as predicted: what a prediction may be wrong by


@dataclass(frozen=True)
class Trial:
    """All that is known of a candidate; ``out`` is why it was left behind, None of the last few."""

    candidate: Candidate
    prediction: Prediction
    loss: Loss | None = None
    speed: SpeedRecord | None = None
    out: str | None = None


class Choice(NamedTuple):
    """Every candidate's trial, and the one to take; None where none keeps within the limits."""

    trials: list[Trial]
    chosen: Trial | None


@dataclass
class Search:
    """One search. ``judge`` and ``stopwatch`` see the same ``bundles``, those of ``shelf``."""

    trials: dict[Candidate, Trial]
    limits: TuneLimits
    judge: LossMeter
    stopwatch: Stopwatch
    shelf: Shelf
    bundles: dict[Key, Bundle]
    full_ms: tuple[float, float, float] = (0.0, 0.0, 0.0)  # losses.Judge.full_ms

    def run(self, progress: Progress) -> Choice:
        """Raises LvlmError; what was measured stays in the stores."""
        self.stopwatch.check()
        self._drop_what_cannot_fit()
        count = rounds(len(self.trials), len(self.judge.samples), self.judge.how.batch)[0][0]
        self._ask([FULL], count, progress)
        self.full_ms = self.judge.full_ms(count)
        self._drop_what_takes_too_long()
        self._fetch()
        running = self._running()
        plan = rounds(len(running), len(self.judge.samples), self.judge.how.batch)
        for number, (count, max_candidates) in enumerate(plan):
            self._ask(running, count, progress)
            last = number + 1 == len(plan)
            following = min(max_candidates, TIMED) if last else plan[number + 1][1]
            if last or min(len(running), following) <= TIMED:
                running = self._thinned(running, max(following, TIMED))
                self._time(running, progress)
                running = self._running()
            running = self._thinned(running, following)
        return Choice(list(self.trials.values()), self._choice(running))

    def _running(self) -> list[Candidate]:
        return [one for one, trial in self.trials.items() if trial.out is None]

    def _leave(self, one: Candidate, why: str) -> None:
        self.trials[one] = replace(self.trials[one], out=why)

    def _drop_what_cannot_fit(self) -> None:
        limit = self.limits.memory
        for one, trial in self.trials.items():
            if limit is not None and trial.prediction.memory > limit and one != FULL:
                self._leave(one, f"needs {size(trial.prediction.memory)}")

    def _drop_what_takes_too_long(self) -> None:
        """Drop candidates by the full model's own times: its vision tower's, and prefill by the
        work that is left."""
        if self.limits.ttft_ms is None:
            return
        vision, prefill, _ = self.full_ms
        for one in self._running():
            predicted = vision + prefill * self.trials[one].prediction.prefill
            if predicted > DOUBT * self.limits.ttft_ms and one != FULL:
                self._leave(one, f"first token after some {predicted:.0f} ms by its work")

    def _fetch(self) -> None:
        """The bundles of those that are left; a recipe that is not for this model leaves, too."""
        served = self.shelf.serve(self._running())
        self.bundles |= served.bundles
        for one in self._running():
            if one.bundle in served.refused:
                self._leave(one, served.refused[one.bundle])

    def _ask(self, some: Sequence[Candidate], count: int, progress: Progress) -> None:
        total = len(self.judge.samples)
        progress.stages += 1
        with progress.stage(f"{len(some)} candidates, {count} of {total} samples") as stage:

            def show(step: EvaluationStep) -> None:
                if step.seconds_left is not None:
                    stage.show(f"{step.job.variant.setting}, {duration(step.seconds_left)} left")

            losses = self.judge.losses(some, count, show)
            best = max(loss.quality for loss in losses.values())
            stage.result = f"the best: {best:.1%}"
        for one in some:
            self.trials[one] = replace(self.trials[one], loss=losses[one])

    def _time(self, some: Sequence[Candidate], progress: Progress) -> None:
        progress.stages += 1
        load = self.stopwatch.load
        with progress.stage(f"{len(some)} candidates, {load.concurrency} at a time") as stage:
            speeds = self.stopwatch.speeds(some, stage)
            best = max((s.tokens_per_s for s in speeds.values()), default=0.0)
            stage.result = f"up to {best:.1f} tokens/s"
        for one in some:
            speed = speeds[one]
            self.trials[one] = replace(self.trials[one], speed=speed)
            if one == FULL:
                continue
            if speed.error is not None:
                self._leave(one, speed.error)
            elif self.limits.ttft_ms is not None and speed.ttft_ms > self.limits.ttft_ms:
                self._leave(one, f"first token after {speed.ttft_ms:.0f} ms")

    def _thinned(self, some: Sequence[Candidate], max_candidates: int) -> list[Candidate]:
        """Keep at most ``max_candidates`` of them; of the others it is noted why they went."""
        losses = {one: loss for one in some if (loss := self.trials[one].loss) is not None}
        speed = self._speed(some)
        stay = left(some, losses, speed, self.limits.max_loss, max_candidates)
        for one in some:
            if one not in stay:
                limit, loss = self.limits.max_loss, losses[one]
                lost = limit is not None and loss.lower_bound > limit
                why = "loses too much" if lost else "others are better"
                self._leave(one, f"{why} ({loss.samples} samples)")
        return stay

    def _speed(self, some: Sequence[Candidate]) -> dict[Candidate, float]:
        """Tokens per second where all are measured; else by the work, from the full model's own
        times, its steps shared by all requests at a time."""
        measured = {one: s.tokens_per_s for one in some if (s := self.trials[one].speed)}
        if len(measured) == len(some):
            return measured
        load = self.stopwatch.load
        vision, prefill, step = self.full_ms
        answer = load.new_tokens * step / load.concurrency
        works = {one: self.trials[one].prediction for one in some}
        return {
            one: 1 / (vision + prefill * work.prefill + answer * work.decode)
            for one, work in works.items()
        }

    def _choice(self, some: Sequence[Candidate]) -> Trial | None:
        full = self.trials[FULL].loss
        if full is not None and full.quality == 0:
            raise DataError(
                f"the full model answers none of the {full.samples} samples as they say, so that "
                "nothing can be lost; give other samples, or --metric rouge"
            )
        fitting = [t for one in some if self._fits(t := self.trials[one])]
        if self.limits.max_loss is not None:
            return max(fitting, key=_tokens_per_s, default=None)
        return min(fitting, key=lambda t: (_lost(t), -_tokens_per_s(t)), default=None)

    def _fits(self, trial: Trial) -> bool:
        limits, speed = self.limits, trial.speed
        if trial.out is not None or speed is None or speed.error is not None:
            return False
        return (
            (limits.memory is None or trial.prediction.memory <= limits.memory)
            and (limits.ttft_ms is None or speed.ttft_ms <= limits.ttft_ms)
            and (limits.max_loss is None or _lost(trial) <= limits.max_loss)
        )


def _tokens_per_s(trial: Trial) -> float:
    return 0.0 if trial.speed is None else trial.speed.tokens_per_s


def _lost(trial: Trial) -> float:
    return 1.0 if trial.loss is None else trial.loss.part
