"""What tests of cache budgets draw: fractions, profiles, policies."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from policies import UNIFORM, changed

from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.policies.shares import ProfileRow

REFERENCE = changed(UNIFORM, semantics="reference")
keeps = st.integers(1, 1000).map(lambda k: k / 1000)
seeds = st.integers(0, 2**32 - 1)


def array(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int64)


def profile_of(rng: np.random.Generator, layers: int, keep: float) -> ProfileRow:
    """Random fractions in (0, 1] with the mean ``keep``."""
    off = rng.random(layers)
    off -= off.mean()
    widest = min(keep * 0.999 / max(-off.min(), 1e-9), (1 - keep) / max(off.max(), 1e-9))
    return ProfileRow(keep, tuple((keep + off * widest * rng.random()).tolist()))


def profiled(rng: np.random.Generator, layers: int, keep: float, **changes: Any) -> Budgets:
    row = profile_of(rng, layers, keep)
    return Budgets.of(changed(UNIFORM, keep=keep, profile=(row,), **changes), layers, None)
