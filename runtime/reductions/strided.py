"""Every so-manieth token: what a grid of half the size would have. A baseline."""

from __future__ import annotations

import numpy as np

from lvlm.runtime.reductions import Chosen


class Strided(Chosen):
    """Rule ``strided``: of V tokens those in the middle of ``count`` stretches of equal length."""

    name = "strided"

    def choose(self, features: np.ndarray, count: int) -> np.ndarray:
        return ((2 * np.arange(count) + 1) * len(features)) // (2 * count)


RULE = Strided()
