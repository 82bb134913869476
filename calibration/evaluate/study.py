"""One evaluation as a whole: bundles and samples in, a folder of results out.

The folder holds settings.json (the command that it belongs to), records.jsonl (what was measured so
far), bundles/ (those made from recipes), and at the end results.json, results.md and results.png.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from lvlm.calibration.datasets.evaluation_samples import EvaluationSample
from lvlm.calibration.evaluate.answer_metrics import AnswerMetric
from lvlm.calibration.evaluate.eval_report import ReportRow, make_row, markdown, results, write
from lvlm.calibration.evaluate.evaluation import evaluate, pending, plan_jobs
from lvlm.calibration.evaluate.records import RecordStore, ResultsError, Run, SampleRecord
from lvlm.calibration.evaluate.variant_runner import Conditions
from lvlm.calibration.evaluate.variants import Bundle, Variant, reference_of
from lvlm.core.progress import Progress, duration

SETTINGS, RECORDS, BUNDLES = "settings.json", "records.jsonl", "bundles"
RESULTS = "results.json", "results.md", "results.png"


def claim(output: Path, settings: Mapping[str, Any], *also: str) -> None:
    """Make the folder, or take it up again if it belongs to the same command; it may hold the files
    ``also``, too. ResultsError."""
    path = output / SETTINGS
    text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
    try:
        if path.is_file():
            old = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in settings if old.get(name) != settings[name]]
            if changed and any((output / name).exists() for name in (RECORDS, RESULTS[0])):
                raise ResultsError(
                    f"{output} holds the results of another command (it differs in "
                    f"{', '.join(changed)}); give another -o, or remove {path} to replace them: "
                    "what is equal is not computed again"
                )
        left = {SETTINGS, RECORDS, BUNDLES, *RESULTS, *also}
        if output.is_dir() and not {p.name for p in output.iterdir()} <= left:
            raise ResultsError(f"{output} holds other files; give another -o or empty it")
        if not output.absolute().parent.is_dir():
            raise ResultsError(f"the folder {output.absolute().parent} does not exist; make it")
        output.mkdir(exist_ok=True)
    except (ValueError, AttributeError):
        raise ResultsError(f"{path} is damaged; remove it") from None
    except OSError as error:
        raise ResultsError(f"{output} cannot be used: {error.strerror or error}") from None
    write(path, text)


@dataclass(frozen=True)
class Study:
    """One evaluation: ``rows`` of the table, on ``samples``, by ``metrics``.

    ``references``: the bundles to take the full cache's texts from; empty if no metric needs them.
    """

    rows: Sequence[Variant]
    references: Sequence[Bundle]
    samples: Sequence[EvaluationSample]
    metrics: Sequence[AnswerMetric]
    how: Conditions

    def run(self, output: Path, progress: Progress) -> list[ReportRow]:
        """Compute what the folder lacks; the rows of results. Raises LvlmError."""
        full = self._full()
        wanted: list[tuple[Variant, Run]] = [(v, run) for v in self.rows for run in self._runs()]
        greedy = [v for v, run in wanted if run == "greedy"]
        wanted += [(v, "greedy") for v in _distinct(full) if v not in greedy]
        jobs = plan_jobs(wanted, self.samples, self.how)
        store = RecordStore(output / RECORDS, SampleRecord)
        progress.stages += len(pending(jobs, self.how, store))
        steps = evaluate(jobs, self.samples, self.how, store)
        for job, some in groupby(steps, key=lambda step: step.job):
            with progress.stage(f"{job.variant.name}, {job.run}") as stage:
                for step in some:
                    stage.result = f"{step.done} samples" if step.done else "out of reach"
                    if step.seconds_left is not None:
                        left = f"about {duration(step.seconds_left)} left for all"
                        stage.show(f"{step.done} of {len(self.samples)}, {left}")
        keys = {(id(job.variant), job.run): job.keys for job in jobs}

        def records(variant: Variant, run: Run) -> list[SampleRecord | None]:
            return [store.get(key) for key in keys[id(variant), run]]

        rows = []
        for index, variant in enumerate(self.rows):
            texts = [r.text or "" for r in records(full[index], "greedy") if r] if full else None
            found = {run: records(variant, run) for run in self._runs()}
            rows.append(make_row(variant, found, self.samples, self.metrics, texts))
        return rows

    def _runs(self) -> list[Run]:
        return list(dict.fromkeys(metric.run for metric in self.metrics))

    def _full(self) -> list[Variant]:
        """Each row's full cache, as the row of its own that it may have."""
        if not any(metric.against_full for metric in self.metrics):
            return []
        full: list[Variant] = []
        for row in self.rows:
            bundle = reference_of(row.bundle, self.references)
            same = (v for v in (*self.rows, *full) if v.bundle.digest == bundle.digest)
            full.append(next(same, Variant(bundle, "full cache")))
        return full


def _distinct(variants: Sequence[Variant]) -> list[Variant]:
    return list({id(variant): variant for variant in variants}.values())


def write_results(
    output: Path,
    rows: Sequence[ReportRow],
    metrics: Sequence[AnswerMetric],
    settings: Mapping[str, Any],
    about: str,
    *,
    timings: bool,
) -> str:
    """Write the three files; the table as text. Raises ResultsError."""
    from lvlm.calibration.evaluate.eval_plots import draw

    table = markdown(rows, metrics, about, timings)
    write(output / RESULTS[0], results(rows, settings, timings))
    write(output / RESULTS[1], table)
    draw(output / RESULTS[2], rows, metrics, timings)
    return table
