"""Measuring what an engine's parts take, one request after the other."""

from __future__ import annotations

import io
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image

from lvlm.bench.costs import Costs, EngineShape, ReadCost, StepCost
from lvlm.bench.workload import WorkloadPrompts, WorkloadRequest
from lvlm.runtime.engine import Engine
from lvlm.runtime.generate.answers import Stats

FIRST_GAPS = 2  # of an answer: the scheduler is still at the prompt
SEEDS = 1000  # of a repetition
WARM_UP_SEEDS = 10**9


@dataclass(frozen=True)
class CostWork:
    """``warming``: prompts that do not count; ``whole``: prompts that begin unlike any other;
    ``growing``: each begins with the one before it; ``stepped``: prompts to be answered by each
    number of ``rows`` at once. All repetitions lie behind one another."""

    warming: tuple[WorkloadRequest, ...]
    whole: tuple[WorkloadRequest, ...]
    growing: tuple[WorkloadRequest, ...]
    stepped: tuple[WorkloadRequest, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class CostPlan:
    """``lengths``: text tokens of prompts. ``copies`` run at once, each with ``threads``."""

    lengths: tuple[int, ...]
    images: int
    new_tokens: int
    slots: int
    threads: int
    copies: int
    warmup: int
    repeats: int
    seed: int


def cost_work(
    writer: WorkloadPrompts, plan: CostPlan, *, growing: bool, again: int = 0
) -> CostWork:
    """Prompts of each length, with images and without; those that are ``growing`` where anything
    may be shared. ``again``: others, of the same shape.

    Raises ParameterError.
    """

    def asked(length: int, images: int, seed: int, tokens: int = 1) -> WorkloadRequest:
        shown = tuple(seed * 10 + i for i in range(images))
        return WorkloadRequest(writer.write(length, images, seed), shown, writer.size, tokens)

    lengths = sorted(plan.lengths)
    work: dict[str, list[WorkloadRequest]] = {"whole": [], "growing": [], "stepped": []}
    for repeat in range(plan.repeats):
        first = (plan.seed + plan.repeats * again + repeat) * SEEDS
        for kind, images in enumerate(dict.fromkeys((plan.images, 0))):
            numbered = enumerate(lengths, first + 100 * kind)
            work["whole"] += [asked(length, images, seed) for seed, length in numbered]
        same = first + SEEDS - 1
        if growing:
            work["growing"] += [asked(length, plan.images, same) for length in lengths]
        work["stepped"] += [asked(n, plan.images, same, plan.new_tokens) for n in lengths]
    before = range(again * SEEDS, again * SEEDS + plan.warmup)
    work["warming"] = [
        asked(n, plan.images, WARM_UP_SEEDS + seed, plan.new_tokens)
        for seed in before
        for n in lengths
    ]
    rows = {*(2**n for n in range(plan.slots.bit_length())), plan.slots}
    return CostWork(**{name: tuple(x) for name, x in work.items()}, rows=tuple(sorted(rows)))


def measure_costs(
    engine: Engine, work: CostWork, threads: int, *, template: bool
) -> tuple[EngineShape, Costs]:
    """Medians over the repetitions."""
    reads: dict[tuple[int, int, int], list[float]] = {}
    steps: dict[tuple[int, int], list[float]] = {}
    images, prepares, longest = list[float](), list[float](), {0: 0}

    def ask(request: WorkloadRequest, rows: int = 1) -> tuple[Stats, list[float]]:
        files = [_png(pixels) for pixels in request.open()]  # as clients of a server send them
        began = time.perf_counter()
        handle = engine.submit(
            request.prompt,
            images=files,
            max_new_tokens=request.new_tokens,
            ignore_eos=True,
            chat_template=template,
            n=rows,
        )
        prepares.append(time.perf_counter() - began)
        return handle.result().stats, list(handle.token_times)

    for request in work.warming:
        ask(request, max(work.rows))
    prepares.clear()
    for request in work.whole:
        stats, _ = ask(request)
        count = len(request.images)
        _read(reads, stats, count)
        longest[count] = max(longest.get(count, 0), stats.prompt_tokens)
        if count:
            images.append(stats.vision_ms / 1e3 / count)
    for request in work.growing:
        stats, _ = ask(request)
        if stats.reused_tokens:
            _read(reads, stats, len(request.images))
    for request in work.stepped:
        for rows in work.rows:
            stats, times = ask(request, rows)
            gaps = [b - a for a, b in pairwise(times)]
            tokens = stats.prompt_tokens + len(times) // 2
            steps.setdefault((rows, tokens), []).extend(gaps[FIRST_GAPS:] or gaps)
    shown = max(longest)
    each = (longest[shown] - longest[0]) // shown if shown else 0
    return engine_shape(engine, threads, each), Costs(
        reads=tuple(ReadCost(*key, statistics.median(s)) for key, s in sorted(reads.items())),
        steps=tuple(StepCost(*key, statistics.median(s)) for key, s in sorted(steps.items())),
        image=statistics.median(images) if images else None,
        prepare=statistics.median(prepares),
    )


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _read(reads: dict[tuple[int, int, int], list[float]], stats: Stats, images: int) -> None:
    """Note what was read of a prompt behind what was there."""
    key = (stats.prompt_tokens - stats.reused_tokens, stats.reused_tokens, images)
    reads.setdefault(key, []).append(stats.prefill_ms / 1e3)


def engine_shape(engine: Engine, threads: int, image_tokens: int) -> EngineShape:
    """Sizes of an engine that a simulation needs, with its default settings."""
    manifest, memory = engine.manifest, engine.memory()
    in_pieces = manifest.in_place and "extend" in manifest.graphs
    features = 4 * manifest.images.tokens * manifest.feature_width
    return EngineShape(
        slots=memory.slots,
        threads=threads,
        chunked=in_pieces,
        shares=in_pieces,
        image_tokens=image_tokens,
        kept_images=memory.images // features,
        sliced=engine.reads_in_slices,
    )
