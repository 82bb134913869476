"""Confidence intervals of some hundred questions: 95 of 100 hold the true value."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Z = 1.96
DRAWS = 2000

Interval = tuple[float, float]


def wilson(right: float, count: int) -> Interval:
    """Wilson's interval of a share of ``count`` answers, of which ``right`` are."""
    share = right / count
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = math.sqrt(share * (1 - share) / count + Z * Z / (4 * count**2))
    half *= Z / (1 + Z * Z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(scores: np.ndarray, value: Callable[[np.ndarray], np.ndarray]) -> Interval:
    """The percentile interval over questions, drawn anew with replacement.

    Args:
        scores: [questions, columns].
        value: from sums over questions [draws, columns] to the figure [draws].
    """
    rng = np.random.default_rng(5)
    draws = rng.multinomial(len(scores), np.full(len(scores), 1 / len(scores)), DRAWS)
    low, high = np.quantile(value(draws @ scores), (0.025, 0.975))
    return float(low), float(high)
