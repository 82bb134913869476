"""How tests evaluate variants of tiny-llava."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lvlm.calibration.datasets.evaluation_samples import EvaluationSample
from lvlm.calibration.evaluate.answer_metrics import METRICS
from lvlm.calibration.evaluate.evaluation import evaluate, plan_jobs
from lvlm.calibration.evaluate.records import RecordStore, Run, SampleRecord
from lvlm.calibration.evaluate.variant_runner import Conditions
from lvlm.calibration.evaluate.variants import Bundle, Variant

HOW = Conditions(max_new_tokens=8)
IMAGE_TOKENS = 576
LAYERS = 8


def records(
    variant: Variant,
    run: Run,
    samples: Sequence[EvaluationSample],
    folder: Path,
    how: Conditions = HOW,
) -> list[SampleRecord]:
    (job,) = plan_jobs([(variant, run)], samples, how)
    store = RecordStore(folder / "records.jsonl", SampleRecord)
    list(evaluate([job], samples, how, store))
    found = [store.get(key) for key in job.keys]
    assert None not in found
    return [record for record in found if record is not None]


def perplexity(found: Sequence[SampleRecord], samples: Sequence[EvaluationSample]) -> float:
    ppl = METRICS["ppl"]
    return ppl.value([ppl.score(s, r, None) for s, r in zip(samples, found, strict=True)])


def without_compression(bundle: Bundle) -> Bundle:
    manifest = dataclasses.replace(bundle.manifest, cache_policy=None)
    return dataclasses.replace(bundle, manifest=manifest)
