"""Cache budgets: the fraction of a call, and what decode may keep."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from budget_cases import array, keeps, profile_of, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import APPENDED, INTERVAL, SLIDING, UNIFORM, changed

from lvlm.core.errors import ParameterError
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.shares import Mixed, ProfileRow, Slope

# What a call keeps: fractions


def test_as_exported_or_as_the_call_says() -> None:
    assert Budgets.of(UNIFORM, 3, None).fractions[:, 0].tolist() == [0.2] * 3
    budgets = Budgets.of(UNIFORM, 3, 0.35)
    assert budgets.fractions[:, 0].tolist() == [0.35] * 3
    assert budgets.keep == 0.35
    assert Budgets.of(UNIFORM, 3, np.float32(0.5)).keep == 0.5
    assert Budgets.of(UNIFORM, 3, 1).keep == 1.0
    assert budgets.protected == 2


def test_without_compression_everything_stays() -> None:
    entries = array([7, 3], [5, 2])
    for kv_keep in (None, 1.0, 1):
        budgets = Budgets.of(None, 2, kv_keep)
        assert budgets.fractions[:, 0].tolist() == [1, 1]
        assert budgets.protected == 0
        np.testing.assert_array_equal(budgets.prompt(entries), entries)
        np.testing.assert_array_equal(budgets.step(entries), entries)
        assert budgets.capacity(entries, np.array([3, 9])).tolist() == [12, 11]
        assert budgets.room(np.array([7, 5]), np.array([20, 11]), 50) == 6
    with pytest.raises(ParameterError, match=r"kv_keep=0\.5 needs a bundle with cache compression"):
        Budgets.of(None, 2, 0.5)


def test_an_interval_is_shortened_and_nothing_else() -> None:
    sooner = INTERVAL.at_most_every(8)
    assert (INTERVAL.interval, sooner.interval) == (64, 8)
    assert sooner == changed(INTERVAL, interval=8)
    assert INTERVAL.at_most_every(65) == INTERVAL
    for policy in (UNIFORM, SLIDING, APPENDED):
        assert policy.interval is None
        assert policy.at_most_every(8) == policy


@pytest.mark.parametrize("cache_policy", [None, UNIFORM, INTERVAL])
@pytest.mark.parametrize(
    "kv_keep", [0, 0.0, -0.5, 1.01, float("nan"), float("inf"), True, False, "0.5", [0.5], 0.5j]
)
def test_unusable_kv_keep(cache_policy: CachePolicy | None, kv_keep: Any) -> None:
    with pytest.raises(ParameterError, match=r"kv_keep is .*; give a number above 0 and up to 1"):
        Budgets.of(cache_policy, 2, kv_keep)


def test_fractions_lie_between_the_rows_of_a_profile() -> None:
    rows = (ProfileRow(0.2, (0.3, 0.1)), ProfileRow(0.5, (0.6, 0.4)))
    cache_policy = changed(UNIFORM, keep=0.5, profile=rows)
    for kv_keep, expected in [
        (None, (0.6, 0.4)),
        (0.1, (0.15, 0.05)),
        (0.2, (0.3, 0.1)),
        (0.3, (0.4, 0.2)),
        (0.75, (0.8, 0.7)),
        (1.0, (1.0, 1.0)),
    ]:
        fractions = Budgets.of(cache_policy, 2, kv_keep).fractions[:, 0]
        np.testing.assert_allclose(fractions, expected, rtol=1e-14)
    assert Budgets.of(cache_policy, 2, 0.2).fractions[:, 0].tolist() == [0.3, 0.1]
    # A last row for everything may be off by what the manifest allows; everything is everything.
    whole = changed(cache_policy, profile=(*rows, ProfileRow(1.0, (1.0, 0.9999999))))
    assert Budgets.of(whole, 2, 1.0).fractions[:, 0].tolist() == [1, 1]


@settings(deadline=None)
@given(seeds, st.integers(1, 40), st.lists(keeps, min_size=1, max_size=4, unique=True), keeps)
def test_the_mean_fraction_is_that_of_the_call(
    seed: int, layers: int, exported: list[float], keep: float
) -> None:
    rng = np.random.default_rng(seed)
    rows = tuple(profile_of(rng, layers, k) for k in sorted(exported))
    fractions = Budgets.of(changed(UNIFORM, profile=rows), layers, keep).fractions
    assert fractions.shape == (layers, 1)
    assert 0 < fractions.min() <= fractions.max() <= 1
    assert math.fsum(fractions[:, 0]) / layers == pytest.approx(keep, rel=1e-12)


# What decode may keep


@settings(deadline=None)
@given(
    st.integers(1, 1000),
    st.lists(st.integers(1, 4000), min_size=1, max_size=20),
    st.integers(0, 5),
    st.integers(1, 40),
    st.integers(0, 200),
    st.one_of(st.none(), st.integers(0, 300)),
)
def test_budget_after_so_many_entries(
    thousandths: int, seen: list[int], sinks: int, recent: int, floor: int, room: int | None
) -> None:
    cap = None if room is None else sinks + recent + room
    changes: dict[str, Any] = {"sinks": sinks, "recent": recent, "cap": cap}
    fixed = Budgets.of(changed(UNIFORM, **changes), 1, thousandths / 1000)
    interval = Budgets.of(
        changed(INTERVAL, **changes, queries=1, floor=floor), 1, thousandths / 1000
    )
    assert fixed.step(array(seen)).dtype == np.int64
    np.testing.assert_array_equal(interval.prompt(array(seen)), interval.step(array(seen)))
    for n, one_by_one, many in zip(
        seen, fixed.step(array(seen))[0], interval.step(array(seen))[0], strict=True
    ):
        share = math.ceil(Fraction(thousandths, 1000) * n)
        most = share if cap is None else min(share, cap)
        assert one_by_one == min(n, max(most, sinks, 1))
        most = max(floor, share) if cap is None else min(max(floor, share), cap)
        assert many == min(n, max(most, sinks + recent))


def test_a_whole_number_is_whole_whatever_floating_point_says() -> None:
    # 0.07 x 100 is 7.000000000000001 in floating point, 0.55 x 100 is 55.00000000000001
    for keep, expected in ((0.07, 7), (0.55, 55)):
        assert Budgets.of(UNIFORM, 1, keep).step(array([100])).tolist() == [[expected]]
        assert Budgets.of(changed(INTERVAL, floor=0), 1, keep).prompt(array([1000]))[0, 0] == (
            expected * 10
        )


@pytest.mark.parametrize(
    ("distance", "sinks", "kept", "expected"),
    [
        (25, 1, [100, 26, 25, 24, 3, 2, 1], [75, 1, 12, 12, 1, 1, 1]),
        (25, 4, [100, 27, 26, 9, 8, 5, 4, 2], [75, 4, 4, 4, 4, 4, 4, 2]),
        (0, 1, [100, 1], [100, 1]),
        (25, 0, [25, 1], [12, 0]),
    ],
)
def test_fixed_point(distance: int, sinks: int, kept: list[int], expected: list[int]) -> None:
    cache_policy = changed(UNIFORM, distance=distance, sinks=sinks)
    point = Budgets.of(cache_policy, 1, None).fixed_point(array(kept))
    assert point.tolist() == [expected]


def test_the_oldest_after_the_sinks_leaves() -> None:
    point = Budgets.of(SLIDING, 1, None).fixed_point(array([100, 5, 4, 2]))
    assert point.tolist() == [[4, 4, 4, 4]]
    assert Budgets.of(SLIDING, 1, 0.5).step(array([100, 9, 7, 3])).tolist() == [[50, 5, 5, 3]]


def test_a_mixed_budget_is_uniform_in_part() -> None:
    rows = (ProfileRow(0.4, (0.7, 0.1)),)
    policy = dataclasses.replace(UNIFORM, budget=Mixed(0.4, rows=rows, adaptive=0.2))
    budgets = Budgets.of(policy, 2, None)
    np.testing.assert_allclose(budgets.fractions[:, 0], (0.46, 0.34), rtol=1e-14)
    assert budgets.prompt(array([100], [100])).ravel().tolist() == [46, 34]


@pytest.mark.parametrize(
    ("keep", "beta", "expected"),
    [
        (0.4, 20, (0.78, 0.4, 0.02)),
        (0.4, 2, (0.6, 0.4, 0.2)),
        (0.4, 1, (0.4, 0.4, 0.4)),
        (0.8, 20, (1.0, 0.8, 0.6)),  # the first layer has no more than everything
        (1.0, 20, (1.0, 1.0, 1.0)),
    ],
)
def test_shares_fall_from_layer_to_layer(
    keep: float, beta: float, expected: tuple[float, ...]
) -> None:
    policy = dataclasses.replace(UNIFORM, budget=Slope(1.0, beta=beta))
    budgets = Budgets.of(policy, 3, keep)
    np.testing.assert_allclose(budgets.fractions[:, 0], expected, rtol=1e-12)
    assert budgets.prompt(array([100], [100], [100])).sum() == round(300 * keep)
    alone = Budgets.of(policy, 1, keep)
    assert alone.fractions.tolist() == [[keep]]
