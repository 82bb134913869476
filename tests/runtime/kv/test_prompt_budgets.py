"""What prefill leaves, against the papers' rules written out, one layer and row at a time."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from budget_cases import REFERENCE, array, keeps, profile_of, profiled, seeds
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import INTERVAL, UNIFORM, changed

from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.policies.shares import ProfileRow


@settings(deadline=None)
@given(
    st.integers(1, 1000),
    st.lists(st.integers(1, 4000), min_size=1, max_size=20),
    st.integers(0, 5),
    st.integers(1, 40),
    st.one_of(st.none(), st.integers(0, 300)),
)
def test_uniform_prompt(
    thousandths: int, entries: list[int], sinks: int, recent: int, cap: int | None
) -> None:
    protected = sinks + recent
    most = None if cap is None else protected + cap
    cache_policy = changed(UNIFORM, sinks=sinks, recent=recent, cap=most)
    budgets = Budgets.of(cache_policy, 2, thousandths / 1000)
    kept = budgets.prompt(array(entries, entries[::-1]))
    assert kept.dtype == np.int64
    np.testing.assert_array_equal(kept[0], kept[1][::-1])
    for n, count in zip(entries, kept[0].tolist(), strict=True):
        share = round(Fraction(thousandths, 1000) * n)  # exact; a half goes to the even number
        if most is not None:
            share = min(share, most)
        assert count == min(n, max(share, protected))


def test_a_half_is_a_half_whatever_floating_point_says() -> None:
    budgets = Budgets.of(changed(UNIFORM, sinks=0, recent=1), 1, 0.7)
    # 0.7 x 45 is 31.499999999999996 in floating point
    assert budgets.prompt(array([45, 15, 5, 25])).tolist() == [[32, 10, 4, 18]]
    profile = (ProfileRow(0.7, (0.7,)),)
    budgets = Budgets.of(changed(UNIFORM, keep=0.7, profile=profile, sinks=0), 1, None)
    assert budgets.prompt(array([45, 15, 5, 25])).tolist() == [[32, 10, 4, 18]]


def test_equal_remainders_are_equal_whatever_floating_point_says() -> None:
    """One entry more than the floors: 4.1 - 4 is less than 1.1 - 1, yet the first layer gets it."""
    profile = (ProfileRow(0.1, (0.1,) * 6),)
    budgets = Budgets.of(changed(UNIFORM, keep=0.1, profile=profile, sinks=0), 6, None)
    entries = array([41], *[[11]] * 5)
    assert budgets.prompt(entries).ravel().tolist() == [5, 1, 1, 1, 1, 1]


def nearest(exact: list[Fraction], lower: list[int], upper: list[int]) -> list[int]:
    """Largest remainder within bounds, one entry at a time: who is owed most gets the next."""
    total = min(max(round(sum(exact)), sum(lower)), sum(upper))
    counts = list(lower)
    for _ in range(total - sum(lower)):
        open_layers = [i for i in range(len(exact)) if counts[i] < upper[i]]
        counts[max(open_layers, key=lambda i: (exact[i] - counts[i], -i))] += 1
    return counts


@settings(deadline=None, max_examples=examples(300))
@given(st.data(), st.integers(1, 6), st.integers(1, 3), st.integers(0, 6), st.integers(0, 6))
def test_profile_prompt_within_bounds(
    data: Any, layers: int, rows: int, sinks: int, recent: int
) -> None:
    """Fractions of 1/64 are exact in floating point, so ties are real ties."""
    recent += sinks + recent == 0  # something is always protected
    shares = data.draw(st.lists(st.integers(1, 64), min_size=layers, max_size=layers))
    cap = data.draw(st.one_of(st.none(), st.integers(max(1, sinks + recent), 40)))
    counts = st.lists(st.integers(1, 60), min_size=rows, max_size=rows)
    entries = np.array([data.draw(counts) for _ in range(layers)], np.int64)
    keep = sum(shares) / 64 / layers
    profile = (ProfileRow(keep, tuple(s / 64 for s in shares)),)
    cache_policy = changed(UNIFORM, keep=keep, profile=profile, sinks=sinks, recent=recent, cap=cap)
    budgets = Budgets.of(cache_policy, layers, None)
    kept = budgets.prompt(entries)
    assert kept.shape == entries.shape
    assert kept.dtype == np.int64
    for row in range(rows):
        n = entries[:, row].tolist()
        exact = [Fraction(s, 64) * m for s, m in zip(shares, n, strict=True)]
        lower = [min(sinks + recent, m) for m in n]
        upper = [m if cap is None else min(m, cap) for m in n]
        assert kept[:, row].tolist() == nearest(exact, lower, upper)


def test_bounds_that_bite_everywhere() -> None:
    """One layer far above its cap and many below their protected count: all end at the latter."""
    profile = (ProfileRow(0.109, (1.0, *(0.01,) * 9)),)
    changes = {"keep": 0.109, "profile": profile, "sinks": 4, "recent": 46}
    for cap in (None, 80):
        budgets = Budgets.of(changed(UNIFORM, **changes, cap=cap), 10, None)
        assert budgets.prompt(np.full((10, 1), 400)).ravel().tolist() == [50] * 10


@pytest.mark.parametrize("part", range(4))
def test_a_profile_keeps_exactly_its_share_of_all_entries(part: int) -> None:
    """1,000 random profiles in four parts."""
    for seed in range(250 * part, 250 * part + 250):
        rng = np.random.default_rng(seed)
        layers, n = int(rng.integers(2, 41)), int(rng.integers(1, 3001))
        thousandths = int(rng.integers(1, 1001))
        budgets = profiled(rng, layers, thousandths / 1000)
        kept = budgets.prompt(np.full((layers, 1), n))[:, 0]
        lower = min(2, n)
        assert lower <= kept.min() <= kept.max() <= n
        exact = round(Fraction(thousandths, 1000) * n * layers)
        assert kept.sum() == max(exact, lower * layers)
        share = budgets.fractions[:, 0] * n
        if lower <= share.min():
            assert np.abs(kept - share).max() < 1


@settings(deadline=None)
@given(seeds, st.integers(2, 40), st.integers(1, 3000), st.booleans())
def test_all_is_all(seed: int, layers: int, n: int, with_profile: bool) -> None:
    rng = np.random.default_rng(seed)
    profile = (profile_of(rng, layers, 0.3),) if with_profile else ()
    entries = rng.integers(1, n + 1, (layers, 3))
    for cache_policy in (UNIFORM, REFERENCE):
        budgets = Budgets.of(changed(cache_policy, profile=profile), layers, 1.0)
        np.testing.assert_array_equal(budgets.prompt(entries), entries)
        np.testing.assert_array_equal(budgets.step(entries), entries)
    budgets = Budgets.of(changed(INTERVAL, profile=profile), layers, 1.0)
    np.testing.assert_array_equal(budgets.prompt(entries), entries)


@settings(deadline=None)
@given(seeds, st.integers(1, 40), st.integers(1, 3000), keeps, keeps, st.booleans())
def test_more_is_more_in_total(
    seed: int, layers: int, n: int, a: float, b: float, with_profile: bool
) -> None:
    rng = np.random.default_rng(seed)
    profile = (profile_of(rng, layers, 0.3),) if with_profile else ()
    entries = np.full((layers, 1), n)
    for cache_policy in (UNIFORM, INTERVAL):
        cache_policy = changed(cache_policy, profile=profile)
        less, more = (
            Budgets.of(cache_policy, layers, keep).prompt(entries).sum() for keep in sorted((a, b))
        )
        assert less <= more
