"""What is lost, and how sure that is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm.calibration.tune.losses import compared

SCORES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(SCORES)
def test_it_is_the_difference_of_means(pairs: list[tuple[bool, bool]]) -> None:
    full, own = ([float(x) for x in column] for column in zip(*pairs, strict=True))
    found = compared(full, own)
    assert found.samples == len(pairs)
    assert found.quality == pytest.approx(np.mean(own))
    if np.mean(full) > 0:
        assert found.part == pytest.approx(1 - np.mean(own) / np.mean(full))
    assert found.margin > 0
    assert math.isfinite(found.part - found.margin)


def test_what_a_model_that_knows_nothing_loses() -> None:
    found = compared([0.0, 0.0], [1.0, 0.0])
    assert (found.part, found.margin) == (0.0, 1.0)


@pytest.mark.parametrize("lost", [0.02, 0.1, 0.4])
def test_the_margin_holds_in_nineteen_of_twenty_cases(lost: float) -> None:
    """Answers of which the full model has nine of ten right, and the candidate ``lost`` fewer."""
    rng = np.random.default_rng(7)
    below = 0
    for _ in range(400):
        full = rng.random(200) < 0.9
        own = full & (rng.random(200) >= lost)
        found = compared(full.astype(float).tolist(), own.astype(float).tolist())
        below += found.part - found.margin <= lost
    assert below >= 0.93 * 400


def test_more_samples_are_surer() -> None:
    few, many = (compared([1.0] * n, [1.0] * (n - 1) + [0.0]) for n in (10, 100))
    assert many.margin < few.margin / 2
