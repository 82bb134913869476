"""Successive halving: few samples for many candidates, all samples for the few that are left.

(Jamieson and Talwalkar, arXiv 1502.07943.) After each round those go that lose too much beyond
doubt, and of the others those of least promise. How steep the rounds are and what promises most
was chosen in simulated worlds, which tests/calibration/tune/test_halving.py has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

from lvlm.calibration.tune.candidates import FULL, Candidate
from lvlm.calibration.tune.losses import ONE_SIDED, Loss

PART = 24  # of the samples the first round asks one in so many
FIRST = 8  # but no fewer: one answer more or less would decide
STEP = 1.6  # more samples from round to round, and fewer candidates
MIN_CANDIDATES = 5  # candidates that the last round compares, at least
WEIGHT = 3  # of speed against the probability that the limit is kept


def rounds(candidates: int, samples: int, batch: int) -> list[tuple[int, int]]:
    """Samples of each round, and how many candidates may take part; multiples of ``batch`` but for
    all samples, so that a prompt is always answered together with the same ones."""
    found: list[tuple[int, int]] = []
    count, some = max(FIRST, math.ceil(samples / PART)), candidates
    while True:
        count = min(samples, math.ceil(count / batch) * batch)
        found.append((count, some))
        if count == samples:
            return found
        count, some = math.ceil(STEP * count), max(MIN_CANDIDATES, math.ceil(some / STEP))


def left(
    some: Sequence[Candidate],
    losses: Mapping[Candidate, Loss],
    speed: Mapping[Candidate, float],
    max_loss: float | None,
    max_candidates: int,
) -> list[Candidate]:
    """Choose at most ``max_candidates`` of ``some``, the full model among them in any case;
    ``speed``: the more the better."""
    others = [one for one in some if one != FULL]
    if max_loss is not None:
        others = [one for one in others if losses[one].lower_bound <= max_loss]
    others.sort(key=lambda one: promise(losses[one], speed[one], max_loss), reverse=True)
    stay = {FULL, *others[: max_candidates - 1]}
    return [one for one in some if one in stay]


def promise(loss: Loss, speed: float, max_loss: float | None) -> tuple[float, float]:
    """The more, the better. With a limit on losses, speed, as far as it is probable that the limit
    is kept; without one, little loss, and of equal ones speed."""
    if max_loss is None:
        return -loss.part, speed
    kept = NormalDist(loss.part, loss.margin / ONE_SIDED).cdf(max_loss)
    return speed**WEIGHT * kept, -loss.part
