"""The search: predictions first, then more samples for whoever promises most, then a choice.

With a limit on what may be lost, the fastest of those within it is chosen; without one, that of
least loss within the others, and of equal ones the fastest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from lvlm.calibration.datasets.evaluation_samples import DataError
from lvlm.calibration.evaluate.evaluation import EvaluationStep
from lvlm.calibration.evaluate.variants import Bundle
from lvlm.calibration.tune.candidates import FULL, Candidate
from lvlm.calibration.tune.limits import TuneLimits
from lvlm.calibration.tune.losses import FullTimes, Loss, LossMeter
from lvlm.calibration.tune.predictions import Prediction
from lvlm.calibration.tune.promise import (
    LITTLE,
    OPTIMISM,
    STEEP,
    THOUGHT_LOST,
    TIE,
    TIMED,
    Outlook,
    budget,
    compresses_less,
    next_count,
)
from lvlm.calibration.tune.shelf import Key, Shelf
from lvlm.calibration.tune.speeds import SpeedRecord, Stopwatch
from lvlm.core.progress import Progress, duration, size

DOUBT = 1.5  # times as fast as predicted: what a prediction may be wrong by
ROUNDING = 1e-6  # answers that no limit is about
HOPELESS = 0.05  # the probability of keeping the limit that is none


@dataclass(frozen=True)
class Trial:
    """All that is known of a candidate; ``out`` is why it was left behind, None of those that could
    be chosen."""

    candidate: Candidate
    prediction: Prediction
    loss: Loss | None = None
    speed: SpeedRecord | None = None
    out: str | None = None

    @property
    def asked(self) -> int:
        return 0 if self.loss is None else self.loss.samples


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
    times: FullTimes = field(default=FullTimes(0.0, 0.0, 0.0, 0.0), init=False)
    left: float = field(default=0.0, init=False)  # of the budget, in answers of the full model

    def __post_init__(self) -> None:
        some = list(self.trials)
        self.less = {a: [b for b in some if compresses_less(b, a)] for a in some}
        self.more = {a: [b for b in some if compresses_less(a, b)] for a in some}

    def run(self, progress: Progress) -> Choice:
        """Raises LvlmError; what was measured stays in the stores."""
        self.stopwatch.check()
        self._drop_what_cannot_fit()
        samples = len(self.judge.samples)
        self._ask(FULL, samples, progress)
        self.times = self.judge.full_times()
        self._drop_what_takes_too_long()
        self._time(FULL, progress)
        everything = samples + self._timing()
        self.left = budget(len(self._running()), everything) - everything
        while (one := self._next()) is not None:
            trial = self.trials[one]
            count = next_count(trial.asked, samples, self.judge.how.batch)
            if not self._fetch(one):
                continue
            if trial.speed is None and (trial.asked >= TIMED or count == samples):
                self._time(one, progress)
                self.left -= self._timing()
            else:
                self.left -= count - trial.asked
                self._ask(one, count, progress)
        self._say_why()
        return Choice(list(self.trials.values()), self._best())

    def _running(self) -> list[Candidate]:
        return [one for one, trial in self.trials.items() if trial.out is None]

    def _leave(self, one: Candidate, why: str) -> None:
        self.trials[one] = replace(self.trials[one], out=why)

    def _timing(self) -> float:
        """Time of measuring a speed, in answers, by the full model's."""
        speed = self.trials[FULL].speed
        assert speed is not None
        return 1000 * speed.seconds / max(self.times.answer, 1e-9)

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
        for one in self._running():
            work = self.trials[one].prediction.prefill
            predicted = self.times.vision + self.times.prefill * work
            if predicted > DOUBT * self.limits.ttft_ms and one != FULL:
                self._leave(one, f"first token after some {predicted:.0f} ms by its work")

    def _fetch(self, one: Candidate) -> bool:
        """The bundle that serves it; False for a recipe that is not for this model, which leaves
        with all of its candidates."""
        if one.bundle in self.bundles:
            return True
        served = self.shelf.serve([one])
        self.bundles |= served.bundles
        for other in self._running():
            if other.bundle in served.refused:
                self._leave(other, served.refused[other.bundle])
        return one.bundle not in served.refused

    def _ask(self, one: Candidate, count: int, progress: Progress) -> None:
        total = len(self.judge.samples)
        progress.stages += 1
        with progress.stage(f"{one.label}, {count} of {total} samples") as stage:

            def show(step: EvaluationStep) -> None:
                if step.seconds_left is not None:
                    stage.show(f"{duration(step.seconds_left)} left")

            loss = self.judge.losses([one], count, show)[one]
            stage.result = f"{loss.part:.1%} lost" if one != FULL else f"{loss.quality:.1%}"
            if self.left > 0:
                most = duration(self.left * self.times.answer / 1000)
                stage.result += f"; the search may take {most} more"
        self.trials[one] = replace(self.trials[one], loss=loss)

    def _time(self, one: Candidate, progress: Progress) -> None:
        progress.stages += 1
        load = self.stopwatch.load
        with progress.stage(f"{one.label}, {load.concurrency} at a time") as stage:
            speed = self.stopwatch.speeds([one], stage)[one]
            stage.result = speed.error or f"{speed.tokens_per_s:.1f} tokens/s"
        self.trials[one] = replace(self.trials[one], speed=speed)
        limit = self.limits.ttft_ms
        if one == FULL:
            return
        if speed.error is not None:
            self._leave(one, speed.error)
        elif limit is not None and speed.ttft_ms > limit:
            self._leave(one, f"first token after {speed.ttft_ms:.0f} ms")

    def _next(self) -> Candidate | None:
        """The candidate that promises most, of those whose answers to all samples can be had."""
        samples, best = len(self.judge.samples), self._best()
        chances = {one: self._chance(trial, best) for one, trial in self.trials.items()}
        found, most = None, LITTLE
        for one in self._running():
            trial = self.trials[one]
            takes = samples - trial.asked + (self._timing() if trial.speed is None else 0)
            if trial.asked == samples or takes > self.left + ROUNDING:
                continue
            alike = [chances[other] for other in self.less[one] if self.trials[other].asked]
            promise = self._worth(min([chances[one], *alike]), trial, best)
            if promise > most:
                found, most = one, promise
        return found

    def _outlook(self, trial: Trial) -> Outlook:
        samples = len(self.judge.samples)
        return Outlook.of(_lost(trial), trial.asked, samples, self._thought(trial))

    def _thought(self, trial: Trial) -> float:
        """The part that may be lost, by those that compress more: it grows with the time that is
        saved, ever faster."""
        others = [self.trials[other] for other in self.more[trial.candidate]]
        parts = [
            other.loss.part * (self._saved(trial) / self._saved(other)) ** STEEP
            for other in others
            if other.loss is not None
        ]
        return min(parts, default=THOUGHT_LOST)

    def _saved(self, trial: Trial) -> float:
        """The part of the full model's time that is not taken, by the work."""
        return max(1 - self._predicted(self.trials[FULL]) / self._predicted(trial), 0.01)

    def _allowed(self) -> float | None:
        """Answers that may be lost on all samples; None: as many as must be."""
        full, part = self.trials[FULL].loss, self.limits.max_loss
        assert full is not None
        return None if part is None else part * full.quality * full.samples + ROUNDING

    def _chance(self, trial: Trial, best: Trial | None) -> tuple[float, float]:
        """Probability that the limit is kept; without one, answers by which it loses less than the
        best, and the probability that it loses no more."""
        outlook, allowed = self._outlook(trial), self._allowed()
        if allowed is not None:
            return outlook.at_most(allowed), 0.0
        everything = float(len(self.judge.samples))
        least = everything if best is None or best.loss is None else best.loss.lost
        return outlook.improvement(least), outlook.at_most(least)

    def _worth(self, chance: tuple[float, float], trial: Trial, best: Trial | None) -> float:
        """The improvement over the best that is to be expected: tokens per second, as parts of the
        full model's; without a limit on losses, answers."""
        fastest = 0.0 if best is None else self._speed(best)
        faster = max(0.0, self._speed(trial) - fastest) / self._speed(self.trials[FULL])
        if self.limits.max_loss is not None:
            return chance[0] * faster
        return chance[0] + TIE * chance[1] * faster

    def _speed(self, trial: Trial) -> float:
        """Tokens per second; where they are not measured, by the work, as far as may be hoped."""
        if trial.speed is not None and trial.speed.error is None:
            return trial.speed.tokens_per_s
        full = self.trials[FULL]
        predicted = self._predicted(trial)
        if full.speed is not None and full.speed.error is None:
            predicted *= full.speed.tokens_per_s / self._predicted(full)
        return predicted if trial is full else OPTIMISM * predicted

    def _predicted(self, trial: Trial) -> float:
        """From the full model's own times, its steps shared by all requests at a time."""
        load, work, times = self.stopwatch.load, trial.prediction, self.times
        steps = load.new_tokens * times.step * work.decode / load.concurrency
        return 1000 * load.new_tokens / (times.vision + times.prefill * work.prefill + steps)

    def _say_why(self) -> None:
        """Note why those that cannot be chosen now were asked no more, or not at all."""
        allowed, samples = self._allowed(), len(self.judge.samples)
        for one in self._running():
            trial = self.trials[one]
            within = allowed is None or _lost(trial) <= allowed
            if one == FULL or (trial.asked == samples and within):
                continue
            hopeless = allowed is not None and self._outlook(trial).at_most(allowed) < HOPELESS
            if not trial.asked:
                self._leave(one, "others promise more (not asked)")
            elif hopeless:
                self._leave(one, f"loses too much ({trial.asked} samples)")
            else:
                self._leave(one, f"others promise more ({trial.asked} samples)")

    def _best(self) -> Trial | None:
        """Best of those with all answers and within all limits."""
        full = self.trials[FULL].loss
        if full is not None and full.quality == 0:
            raise DataError(
                f"the full model answers none of the {full.samples} samples as they say, so that "
                "nothing can be lost; give other samples, or --metric rouge"
            )
        fitting = [trial for trial in self.trials.values() if self._fits(trial)]
        if self.limits.max_loss is not None:
            return max(fitting, key=_tokens_per_s, default=None)
        return min(fitting, key=lambda t: (_lost(t), -_tokens_per_s(t)), default=None)

    def _fits(self, trial: Trial) -> bool:
        limits, speed, allowed = self.limits, trial.speed, self._allowed()
        if trial.out is not None or speed is None or speed.error is not None:
            return False
        return (
            trial.asked == len(self.judge.samples)
            and (limits.memory is None or trial.prediction.memory <= limits.memory)
            and (limits.ttft_ms is None or speed.ttft_ms <= limits.ttft_ms)
            and (allowed is None or _lost(trial) <= allowed)
        )


def _tokens_per_s(trial: Trial) -> float:
    return 0.0 if trial.speed is None else trial.speed.tokens_per_s


def _lost(trial: Trial) -> float:
    return 0.0 if trial.loss is None else trial.loss.lost
