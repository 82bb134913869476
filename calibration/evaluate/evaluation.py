"""The loop of an evaluation: every sample through every variant, but what is known already."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby

from lvlm.calibration.datasets.evaluation_samples import EvaluationSample
from lvlm.calibration.evaluate.fit import SampleShape, new_tokens, solve_keep
from lvlm.calibration.evaluate.records import RecordStore, Run, SampleRecord, key_of
from lvlm.calibration.evaluate.variant_runner import BundleRunner, Conditions
from lvlm.calibration.evaluate.variants import Variant
from lvlm.core.errors import CapacityError

TOOLS = ("lvlm-deploy", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class EvaluationJob:
    """One run of all samples through one variant; ``keys`` name its records."""

    variant: Variant
    run: Run
    keys: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationStep:
    """Progress of an evaluation: samples of a job that are through, and the seconds probably left
    for all jobs (None: not known yet)."""

    job: EvaluationJob
    done: int
    seconds_left: float | None


def plan_jobs(
    wanted: Sequence[tuple[Variant, Run]], samples: Sequence[EvaluationSample], how: Conditions
) -> list[EvaluationJob]:
    """A job for each pair; a record's key holds all that it depends on."""
    digests = [sample.digest() for sample in samples]
    tools = {name: version for name in TOOLS if (version := _version(name))}

    def keys(variant: Variant, run: Run) -> list[str]:
        return [
            key_of(
                bundle=variant.bundle.digest,
                settings=[variant.keep, variant.kv_keep, variant.wanted],
                run=[run, how.max_new_tokens if run == "greedy" else None],
                conditions=[how.device, how.threads, how.system],
                tools=tools,
                together=digests[chunk],
                row=row,
            )
            for chunk in _chunks(len(samples), how.batch)
            for row in range(chunk.stop - chunk.start)
        ]

    return [EvaluationJob(variant, run, tuple(keys(variant, run))) for variant, run in wanted]


def pending(
    jobs: Sequence[EvaluationJob], how: Conditions, store: RecordStore[SampleRecord]
) -> list[EvaluationJob]:
    """The jobs that ``store`` lacks records of."""
    return [job for job in jobs if _missing(job, how, store)]


def evaluate(
    jobs: Sequence[EvaluationJob],
    samples: Sequence[EvaluationSample],
    how: Conditions,
    store: RecordStore[SampleRecord],
) -> Iterator[EvaluationStep]:
    """Add the records of ``jobs`` that ``store`` lacks, batch by batch, and say how far it is.

    A bundle is loaded once for all its jobs, and not at all if nothing of it is missing. Whether
    every sample fits is known before the first is run. Raises LvlmError; what was added stays.
    """
    missing = {id(job): _missing(job, how, store) for job in jobs}
    total, done, began = sum(map(len, missing.values())), 0, time.monotonic()
    for bundle, group in groupby(pending(jobs, how, store), key=lambda job: job.variant.bundle):
        todo = list(group)
        yield EvaluationStep(todo[0], 0, None)
        runner = BundleRunner(bundle, how)
        shapes = [runner.shape(sample) for sample in samples]
        plans = [(job, _keeps(job, samples, shapes, how)) for job in todo]
        with runner:
            for job, keeps in plans:
                yield EvaluationStep(job, 0, None)
                if isinstance(keeps, list):
                    store.add(keeps)
                    total -= len(missing[id(job)])
                    continue
                for chunk in missing[id(job)]:
                    store.add(_run(runner, job, chunk, keeps, samples, shapes))
                    done += 1
                    left = (time.monotonic() - began) / done * (total - done)
                    yield EvaluationStep(job, chunk.stop, left)


def _keeps(
    job: EvaluationJob,
    samples: Sequence[EvaluationSample],
    shapes: Sequence[SampleShape],
    how: Conditions,
) -> tuple[float | None, ...] | list[SampleRecord]:
    """The solved ``keep`` of every sample, None where nothing is to be solved; or the records of
    those that cannot reach the wanted fraction. CapacityError for a sample without room."""
    variant, manifest = job.variant, job.variant.bundle.manifest
    keeps: list[float | None] = [None] * len(samples)
    if variant.wanted is not None:
        reaches = [solve_keep(manifest, shape, variant.wanted) for shape in shapes]
        beyond = [
            SampleRecord(key, sample.id, least=reach.min_kept)
            for key, sample, reach in zip(job.keys, samples, reaches, strict=True)
            if reach.keep is None
        ]
        if beyond:
            return beyond
        keeps = [reach.keep for reach in reaches]
    for sample, shape, keep in zip(samples, shapes, keeps, strict=True):
        wanted = len(shape.answer) if job.run == "forced" else how.max_new_tokens
        option = variant.keep if keep is None else keep
        room = new_tokens(manifest, shape, option, variant.kv_keep, wanted)
        if room < wanted:
            capacity = manifest.capacity
            raise CapacityError(
                f"{sample.where}: {variant.name} has room for {room} of {wanted} new tokens; "
                f"export with more than --max-text-len {capacity.max_text_len} and --max-images "
                f"{capacity.max_images}, or with a larger keep, or lower --max-new-tokens"
            )
    return tuple(keeps)


def _run(
    runner: BundleRunner,
    job: EvaluationJob,
    chunk: slice,
    keeps: Sequence[float | None],
    samples: Sequence[EvaluationSample],
    shapes: Sequence[SampleShape],
) -> list[SampleRecord]:
    """A chunk's records; only prompts of equal ``keep`` can be run together."""
    records = []
    for keep in dict.fromkeys(keeps[chunk]):
        rows = [row for row in range(chunk.start, chunk.stop) if keeps[row] == keep]
        records += runner.run(
            job.run,
            job.variant,
            keep,
            [samples[row] for row in rows],
            [shapes[row] for row in rows],
            [job.keys[row] for row in rows],
        )
    return records


def _missing(job: EvaluationJob, how: Conditions, store: RecordStore[SampleRecord]) -> list[slice]:
    """The chunks that lack a record; none where a sample is known to be out of reach."""
    known = [store.get(key) for key in job.keys]
    if any(record is not None and record.kept is None for record in known):
        return []
    return [chunk for chunk in _chunks(len(known), how.batch) if None in known[chunk]]


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
