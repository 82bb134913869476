"""The one rule by which counts come from fractions: to the nearest integer, halves to the even one,
after what lies beyond nine decimals is dropped as noise of floating point (0.35 x 150 is 52.5)."""

from __future__ import annotations

from typing import overload

import numpy as np

DIGITS = 9


@overload
def rounded(share: float) -> int: ...
@overload
def rounded(share: np.ndarray) -> np.ndarray: ...
def rounded(share: float | np.ndarray) -> int | np.ndarray:
    """The integer, int for a float and int64 of the same shape for an array."""
    nearest = np.rint(np.round(share, DIGITS))
    return nearest.astype(np.int64) if isinstance(nearest, np.ndarray) else int(nearest)
