"""Promises of candidates: the improvement over the best so far that is to be expected.

(Jones, Schonlau and Welch, Efficient Global Optimization, J. Global Optimization 13, 1998, for
answers of a fixed set of samples.) The samples not asked yet are lost with a probability of which
little is known but what those asked say: beta-binomial. The figures below were chosen in simulated
worlds, which tests/calibration/tune/test_search.py has, and on answers of tiny-llava.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lvlm.calibration.tune.candidates import FULL, OWN_CACHE, Candidate

FIRST = 4  # samples at first: enough to see who loses most
STEP = 1.6  # more samples from time to time
PART = (
    0.18  # of what asking all everything would take: a fifth, if answers take longer than expected
)
MIN_CANDIDATES = 4  # but so many can answer everything, however few there are
THOUGHT_OF, THOUGHT_LOST = 2.0, 0.1  # samples thought of before the first, and their part lost
STEEP = 2  # power of the time saved that losses grow with
LEAST = 0.01  # that is thought to be lost, and to be kept
OPTIMISM = 1.2  # times as fast as predicted, a candidate may be before its speed is measured
TIMED = 20  # samples answered before a speed is measured, which takes as long as many answers
TIE = 0.1  # answers that twice the speed is worth where the least loss is wanted
LITTLE = 1e-5  # promises that are none


def budget(candidates: int, answers: float) -> float:
    """Answers that a search may take in all; ``answers``: those that one candidate takes."""
    return max(PART * candidates, min(MIN_CANDIDATES, candidates)) * answers


def next_count(asked: int, samples: int, batch: int) -> int:
    """Count of samples to ask the next time, of ``samples``; a multiple of ``batch`` but for all
    of them, so that a prompt is always answered together with the same ones."""
    count = max(FIRST, math.ceil(STEP * asked))
    return min(samples, math.ceil(count / batch) * batch)


@dataclass(frozen=True)
class Outlook:
    """Answers that may be lost on all samples: ``lost`` now, and k more with probability
    ``chances[k]``."""

    lost: float
    chances: np.ndarray

    @staticmethod
    @lru_cache(4096)  # of most candidates nothing new is known from step to step
    def of(lost: float, asked: int, samples: int, thought: float = THOUGHT_LOST) -> Outlook:
        """After ``lost`` answers (below 0: there are more right ones) of those ``asked``;
        ``thought``: the part that was thought to be lost before."""
        left = samples - asked
        known = min(max(lost, 0.0), asked)
        thought = min(max(thought, LEAST), 1 - LEAST)
        a, b = THOUGHT_OF * thought + known, THOUGHT_OF * (1 - thought) + asked - known
        k = np.arange(left)
        steps = (left - k) * (a + k) / ((k + 1) * (b + left - k - 1))
        none = math.lgamma(b + left) - math.lgamma(b) - math.lgamma(a + b + left)
        logs = np.concatenate([[0.0], np.cumsum(np.log(steps))]) + none + math.lgamma(a + b)
        return Outlook(lost, np.exp(logs))

    def at_most(self, limit: float) -> float:
        """The probability that no more than ``limit`` are lost."""
        more = math.floor(limit - self.lost + 1e-6)
        return float(self.chances[: more + 1].sum()) if more >= 0 else 0.0

    def improvement(self, best: float) -> float:
        """Mean of the answers by which fewer than ``best`` are lost; more count as none fewer."""
        fewer = best - self.lost - np.arange(len(self.chances))
        return float((self.chances * fewer.clip(0)).sum())


def compresses_less(one: Candidate, other: Candidate) -> bool:
    """True where ``other`` does what ``one`` does, and more of it, so that it may lose no less.
    The full model does nothing."""
    if FULL in (one, other) or one == other:
        return False
    alike = one.bundle == other.bundle
    image_alone = one.recipe == other.recipe and one.kv == "none" and other.kv is not None
    cache_alone = one.kv is None and one.recipe == other.kv != OWN_CACHE
    return (
        (alike or image_alone or cache_alone)
        and _no_less(one.keep, other.keep)
        and _no_less(one.kv_keep, other.kv_keep)
    )


def _no_less(one: float | None, other: float | None) -> bool:
    return one is None or (other is not None and one >= other)
