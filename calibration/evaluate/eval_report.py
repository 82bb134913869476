"""Results of an evaluation: rows from the records, as JSON, as a Markdown table, as a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lvlm.calibration.datasets.evaluation_samples import EvaluationSample
from lvlm.calibration.evaluate.answer_metrics import AnswerMetric
from lvlm.calibration.evaluate.records import ResultsError, Run, SampleRecord
from lvlm.calibration.evaluate.variants import Variant
from lvlm.core.output import whole_file

NONE = "–"  # noqa: RUF001 - a dash, as tables have it
TIMES = ("vision_ms", "prefill_ms", "decode_ms")


@dataclass(frozen=True)
class ReportRow:
    """One variant's results; None where the wanted fraction is out of reach.

    ``kept``: entries left after prefill over prompt tokens, mean over layers and samples. Bytes are
    of one prompt's cache, when its answer is finished. ``prefill_ms`` is a batch's, without vision;
    ``decode_ms`` the time from one token of an answer to the next. ``least``: the smallest kept
    fraction that all samples can reach, where the wanted one is not.
    """

    variant: Variant
    values: dict[str, float | None]
    kept: float | None
    least: float | None
    cache_bytes_used: float | None
    cache_bytes_allocated: float | None
    prefill_ms: float | None
    decode_ms: float | None
    samples: list[dict[str, Any]]


def make_row(
    variant: Variant,
    records: Mapping[Run, Sequence[SampleRecord | None]],
    samples: Sequence[EvaluationSample],
    metrics: Sequence[AnswerMetric],
    full: Sequence[str] | None,
) -> ReportRow:
    """``records`` of each run, in the samples' order (None: not run, as another sample is out of
    reach); ``full`` are the full cache's greedy texts."""
    beyond = [r for run in records.values() for r in run if r is not None and r.kept is None]
    if beyond:
        least = max(r.least or 0.0 for r in beyond)
        values: dict[str, float | None] = dict.fromkeys(m.name for m in metrics)
        return ReportRow(variant, values, None, least, None, None, None, None, [])
    done = {run: [r for r in found if r is not None] for run, found in records.items()}
    scores = {
        metric.name: [
            metric.score(sample, record, full[i] if full is not None else None)
            for i, (sample, record) in enumerate(zip(samples, done[metric.run], strict=True))
        ]
        for metric in metrics
    }
    # Where both ran, answers of equal length make the better comparison
    measured = done["forced" if "forced" in done else "greedy"]
    steps = sum(r.decode_steps for r in measured)
    return ReportRow(
        variant=variant,
        values={metric.name: metric.value(scores[metric.name]) for metric in metrics},
        kept=_mean([_number(r.kept) for r in measured]),
        least=None,
        cache_bytes_used=_mean([r.cache_bytes_used for r in measured]),
        cache_bytes_allocated=_mean([r.cache_bytes_allocated for r in measured]),
        prefill_ms=_mean([r.prefill_ms for r in measured]),
        decode_ms=math.fsum(r.decode_ms for r in measured) / steps if steps else 0.0,
        samples=[
            {
                "id": sample.id,
                "values": {m.name: m.value([scores[m.name][i]]) for m in metrics},
                **{run: _plain(found[i]) for run, found in done.items()},
            }
            for i, sample in enumerate(samples)
        ],
    )


def _plain(record: SampleRecord) -> dict[str, Any]:
    plain = {name: value for name, value in asdict(record).items() if value is not None}
    del plain["key"], plain["sample"]
    return plain


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def _number(value: float | None) -> float:
    assert value is not None
    return value


def markdown(
    rows: Sequence[ReportRow], metrics: Sequence[AnswerMetric], about: str, timings: bool
) -> str:
    """The table, below one line ``about`` it, with the meaning of its columns."""
    texts = ["bundle", "recipe", "setting"]
    head = ["kept cache", *(m.title for m in metrics), "cache used", "cache allocated"]
    head += ["prefill ms", "decode ms/token"] if timings else []
    lines = [about, "", _line([*texts, *head]), _line(["---"] * 3 + ["--:"] * len(head))]
    for row in rows:
        manifest = row.variant.bundle.manifest
        cells = [row.variant.bundle.label.replace("|", "\\|"), manifest.recipe, row.variant.setting]
        cells += [_format(row.kept, ".1%")]
        cells += [_format(row.values[m.name], m.style) for m in metrics]
        cells += [_kilobytes(row.cache_bytes_used), _kilobytes(row.cache_bytes_allocated)]
        cells += [_format(row.prefill_ms, ".1f"), _format(row.decode_ms, ".2f")] if timings else []
        lines.append(_line(cells))
    lines += ["", *(f"- {m.title}: {m.meaning}." for m in metrics)]
    lines += [
        "- kept cache: entries left after prefill over the prompt's tokens, mean over layers and "
        "samples; cache used: by one prompt when its answer is finished, with remembered queries."
    ]
    if timings:
        lines.append(
            "- prefill: of the prompts run together, without the vision tower; decode: from one "
            "token of an answer to the next."
        )
    lines += [
        f"- {row.variant.name}: out of reach, text and unmerged blocks alone leave {row.least:.1%}."
        for row in rows
        if row.least is not None
    ]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _format(value: float | None, style: str) -> str:
    return NONE if value is None else format(value, style)


def _kilobytes(value: float | None) -> str:
    return NONE if value is None else f"{value / 1000:,.1f} kB"


def results(rows: Sequence[ReportRow], settings: Mapping[str, Any], timings: bool) -> str:
    """Everything as JSON text: the command's settings, the rows, every sample's record."""
    found = []
    for row in rows:
        bundle = row.variant.bundle
        data = {f.name: getattr(row, f.name) for f in fields(row)} | {
            "variant": row.variant.name,
            "bundle": bundle.label,
            "recipe": bundle.manifest.recipe,
            "parameters": bundle.manifest.parameters,
            "setting": row.variant.setting,
        }
        found.append(data if timings else _without_times(data))
    return json.dumps({"settings": settings, "rows": found}, indent=1, ensure_ascii=False) + "\n"


def _without_times(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _without_times(v) for k, v in data.items() if k not in TIMES}
    return [_without_times(x) for x in data] if isinstance(data, list) else data


def write(path: Path, text: str) -> None:
    """Replaces ``path`` in one step. Raises ResultsError."""
    with whole_file(path, ResultsError) as partial:
        partial.write_text(text, encoding="utf-8")
