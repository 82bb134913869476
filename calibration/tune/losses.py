"""Losses: what a candidate's answers are worth beside the full model's, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lvlm.calibration.datasets.evaluation_samples import EvaluationSample
from lvlm.calibration.evaluate.answer_metrics import AnswerMetric
from lvlm.calibration.evaluate.evaluation import EvaluationStep, evaluate, plan_jobs
from lvlm.calibration.evaluate.records import RecordStore, SampleRecord
from lvlm.calibration.evaluate.variant_runner import Conditions
from lvlm.calibration.evaluate.variants import Bundle, Variant
from lvlm.calibration.tune.candidates import FULL, Candidate

ONE_SIDED = 1.645  # standard errors: 95 of 100 are not beyond it


@dataclass(frozen=True)
class Loss:
    """``quality`` by the metric, on ``samples`` samples, where ``lost`` is what the full model's
    are worth more, all together; ``part`` of the full model's that is lost (below 0: none is);
    what it really is lies, in 95 of 100 cases, above ``part - margin``."""

    samples: int
    quality: float
    lost: float
    part: float
    margin: float


class FullTimes(NamedTuple):
    """Times of the full model: milliseconds of the vision tower and of prefill per prompt, of a
    decode step, and of an answer to a sample in all."""

    vision: float
    prefill: float
    step: float
    answer: float


@dataclass(frozen=True)
class LossMeter:
    """Samples, and how answers to them are scored. ``bundles``: by what they serve."""

    samples: Sequence[EvaluationSample]
    metric: AnswerMetric
    how: Conditions
    store: RecordStore[SampleRecord]
    bundles: Mapping[tuple[str, str | None], Bundle]

    def losses(
        self,
        some: Sequence[Candidate],
        count: int,
        show: Callable[[EvaluationStep], None] = lambda _: None,
    ) -> dict[Candidate, Loss]:
        """Those on the first ``count`` samples; what is known is not computed again.

        Raises LvlmError.
        """
        wanted = sorted({FULL, *some}, key=lambda one: (one.recipe, one.kv or "", one.label))
        samples = self.samples[:count]
        pairs = [(self._variant(one), self.metric.run) for one in wanted]
        jobs = plan_jobs(pairs, samples, self.how)
        for step in evaluate(jobs, samples, self.how, self.store):
            show(step)
        records = {
            one: [self.store.get(key) for key in job.keys]
            for one, job in zip(wanted, jobs, strict=True)
        }
        texts = [record.text for record in records[FULL] if record is not None]
        scores = {
            one: [
                self.metric.score(sample, record, full).total
                for sample, record, full in zip(samples, found, texts, strict=True)
                if record is not None
            ]
            for one, found in records.items()
        }
        return {one: compared(scores[FULL], scores[one]) for one in wanted}

    def full_times(self) -> FullTimes:
        """Means over all samples, which ``losses`` has run."""
        (job,) = plan_jobs([(self._variant(FULL), self.metric.run)], self.samples, self.how)
        records = [record for key in job.keys if (record := self.store.get(key)) is not None]
        prompts = len(records) * self.how.batch  # times are of those run together
        vision, prefill, decode = (
            math.fsum(getattr(record, name) for record in records)
            for name in ("vision_ms", "prefill_ms", "decode_ms")
        )
        steps = max(1, sum(record.decode_steps for record in records))
        return FullTimes(
            vision / prompts,
            prefill / prompts,
            decode / steps,
            (vision + prefill + decode) / prompts,
        )

    def _variant(self, one: Candidate) -> Variant:
        return Variant(self.bundles[one.bundle], one.label, one.keep, one.kv_keep)


def compared(full: Sequence[float], own: Sequence[float]) -> Loss:
    """The loss by scores of the same samples, the full model's and a candidate's.

    The margin is that of a mean of differences of pairs: what both get wrong says nothing. It is
    never 0, and wide for a few samples: two more than were asked are thought of, one of them lost.
    """
    count, reference = len(full), math.fsum(full) / len(full)
    if reference <= 0:
        return Loss(count, math.fsum(own) / count, 0.0, 0.0, 1.0)
    differences = [a - b for a, b in zip(full, own, strict=True)]
    lost = math.fsum(differences) / count
    spread = math.fsum((d - lost) ** 2 for d in [*differences, 0.0, 1.0]) / count
    margin = ONE_SIDED * math.sqrt(spread / count)
    return Loss(count, math.fsum(own) / count, lost * count, lost / reference, margin / reference)
