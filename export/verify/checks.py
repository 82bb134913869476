"""One comparison of a validation, and how two arrays and two answers are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

UNIT = "of the largest value"
# Largest |difference| over the largest |reference|, by the dtype that was run; int8: of caches, a
# number that was rounded the other way.
TOLERANCE = {
    torch.float32: 1e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 5e-2,
    torch.int8: 2e-2,
}


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


def wrong_tokens(
    ours: Sequence[int], theirs: Sequence[int], scores: Sequence[torch.Tensor], limit: float
) -> int:
    """Tokens that differ though the judge was not undecided between the two."""
    wrong = 0
    for a, b, of in zip(ours, theirs, scores, strict=False):
        finite = of[torch.isfinite(of)]
        gap = float(of[b] - of[a])
        wrong += a != b and gap > limit * float(finite.abs().max())
    return wrong


def table(checks: Sequence[Check]) -> str:
    width = max(len(c.name) for c in checks)
    return "\n".join(
        f"  {_mark(c)} {c.name:{width}}  {c.figure:.3g} {c.unit}"
        + ("" if c.limit is None else f" (limit {c.limit:.3g})")
        for c in checks
    )


def _mark(check: Check) -> str:
    if check.limit is None:
        return "·"
    return "✓" if check.passed else "✗"
