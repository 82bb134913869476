"""One comparison of a validation, and how two arrays are compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Check:
    """One comparison: ``figure`` must not exceed ``limit``; None: it is only told."""

    name: str
    figure: float
    limit: float | None
    unit: str

    @property
    def passed(self) -> bool:
        return self.limit is None or self.figure <= self.limit


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest |difference| over the largest |theirs|; infinity where that is no number."""
    if ours.shape != theirs.shape:
        return float("inf")
    apart = float(np.abs(ours.astype(np.float64) - theirs).max())
    found = apart / max(float(np.abs(theirs).max()), 1e-6)
    return found if np.isfinite(found) else float("inf")
