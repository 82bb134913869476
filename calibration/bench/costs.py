"""Costs of an engine's parts as lvlm-bench --costs writes them: an image, a prompt, a step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm.core.errors import BundleError, ParameterError
from lvlm.core.typed_json import decode, read_json


@dataclass(frozen=True)
class ReadCost:
    """Reading of ``tokens`` of a prompt of ``images``, whose tokens count, behind ``behind``
    others that were in the cache; without the time that images take."""

    tokens: int
    behind: int
    images: int
    seconds: float


@dataclass(frozen=True)
class StepCost:
    """One decode step of ``rows`` requests, from one token to the next. ``tokens``: of each row,
    prompt and answer so far."""

    rows: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Costs:
    """Medians, in seconds. ``image``: the vision graph for one; None: no images were asked for.
    ``prepare``: what a request takes before the engine has it, in the thread that asks: opening and
    scaling its images, tokenizing."""

    reads: tuple[ReadCost, ...]
    steps: tuple[StepCost, ...]
    image: float | None
    prepare: float


@dataclass(frozen=True)
class EngineShape:
    """An engine as its scheduler sees it.

    ``chunked``: prompts are read in chunks between steps; ``shares``: a prompt that begins like
    another one, images included, is read from there on. ``image_tokens``: of one image;
    ``kept_images``: how many the cache of images holds. ``sliced``: prompts are read in slices of
    time, whatever their chunks.
    """

    slots: int
    threads: int
    chunked: bool
    shares: bool
    image_tokens: int
    kept_images: int
    sliced: bool = False


@dataclass(frozen=True)
class MeasuredCosts:
    """One contender of a file. ``alone``: nothing else ran; ``beside``: as many ``copies`` of it
    ran at once on one machine, each on cores of its own."""

    contender: str
    engine: EngineShape
    copies: int
    alone: Costs
    beside: Costs | None = None


def middle(found: Iterable[Costs]) -> Costs:
    """Costs as several copies had them: the median of each."""
    several = list(found)
    first = several[0]
    images = [costs.image for costs in several if costs.image is not None]
    return Costs(
        reads=tuple(
            ReadCost(r.tokens, r.behind, r.images, statistics.median(c.seconds for c in same))
            for r, *same in zip(first.reads, *(costs.reads for costs in several), strict=True)
        ),
        steps=tuple(
            StepCost(s.rows, s.tokens, statistics.median(c.seconds for c in same))
            for s, *same in zip(first.steps, *(costs.steps for costs in several), strict=True)
        ),
        image=statistics.median(images) if images else None,
        prepare=statistics.median(costs.prepare for costs in several),
    )


def read_costs(path: Path, contender: str | None = None) -> MeasuredCosts:
    """The costs of one contender of a file, the only one unless it is named.

    Raises ParameterError.
    """
    try:
        data: Any = read_json(path)
        rows = data.get("results", []) if isinstance(data, dict) else []
        found = [
            decode(MeasuredCosts, {k: row.get(k) for k in FIELDS}, f"{path}: costs")
            for row in rows
            if isinstance(row, dict) and row.get("alone") is not None
        ]
    except BundleError as error:
        raise ParameterError(f"{path}: no costs to be read ({error}); measure them anew") from None
    if not found:
        raise ParameterError(f"{path} has no costs; write it with lvlm-bench --costs --json FILE")
    names = [each.contender for each in found]
    if contender is None and len(found) > 1:
        raise ParameterError(f"{path} has several contenders; give one: {', '.join(names)}")
    if contender is not None and contender not in names:
        raise ParameterError(f"{path} has no contender '{contender}'; give {', '.join(names)}")
    chosen = found[0] if contender is None else found[names.index(contender)]
    _check(path, chosen)
    return chosen


FIELDS = ("contender", "engine", "copies", "alone", "beside")


def _check(path: Path, found: MeasuredCosts) -> None:
    """Raises ParameterError where nothing can be computed with them."""
    engine, several = found.engine, [c for c in (found.alone, found.beside) if c is not None]
    times = [t for c in several for t in (c.prepare, *([] if c.image is None else [c.image]))]
    whole = [r.seconds for c in several for r in c.reads]
    whole += [s.seconds for c in several for s in c.steps]
    smallest = min(engine.slots, engine.threads, engine.image_tokens + 1, engine.kept_images + 1)
    rows = [each.rows for c in several for each in c.steps]
    sizes = [r.tokens for c in several for r in c.reads]
    sizes += [s.tokens for c in several for s in c.steps]
    if (
        not all(c.reads and c.steps for c in several)
        or not all(math.isfinite(t) and t >= 0 for t in times)
        or not all(math.isfinite(t) and t > 0 for t in whole)
        or min(smallest, found.copies, *rows, *sizes) < 1
    ):
        raise ParameterError(f"{path}: its costs are no times of an engine; measure them anew")
