"""Cache budgets against the papers' rules, written out plainly, one layer and row at a time."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import APPENDED, INTERVAL, SLIDING, UNIFORM, changed

from lvlm.core.errors import ParameterError
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.shares import Mixed, ProfileRow

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


# What prefill leaves


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


@settings(deadline=None, max_examples=300)
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


def test_the_released_code_guards_no_sink() -> None:
    cache_policy = changed(UNIFORM, distance=25, sinks=4, semantics="reference")
    point = Budgets.of(cache_policy, 1, None).fixed_point(array([100, 27, 26, 9, 5, 2]))
    assert point.tolist() == [[75, 2, 1, 4, 2, 1]]
    assert point.dtype == np.int64


def test_the_oldest_after_the_sinks_leaves() -> None:
    point = Budgets.of(SLIDING, 1, None).fixed_point(array([100, 5, 4, 2]))
    assert point.tolist() == [[4, 4, 4, 2]]
    assert Budgets.of(SLIDING, 1, 0.5).step(array([100, 9, 3])).tolist() == [[50, 5, 3]]


def test_a_mixed_budget_is_uniform_in_part() -> None:
    rows = (ProfileRow(0.4, (0.7, 0.1)),)
    policy = dataclasses.replace(UNIFORM, budget=Mixed(0.4, rows=rows, adaptive=0.2))
    budgets = Budgets.of(policy, 2, None)
    np.testing.assert_allclose(budgets.fractions[:, 0], (0.46, 0.34), rtol=1e-14)
    assert budgets.prompt(array([100], [100])).ravel().tolist() == [46, 34]


@settings(deadline=None)
@given(keeps, st.integers(0, 60), st.integers(2, 40), st.booleans(), seeds)
def test_where_nothing_leaves_room_is_laid_out_for_the_prompt_and_what_may_follow(
    keep: float, images: int, text: int, with_profile: bool, seed: int
) -> None:
    rows = (profile_of(np.random.default_rng(seed), 3, 0.3),) if with_profile else ()
    budgets = Budgets.of(changed(APPENDED, profile=rows), 3, keep)
    limit = budgets.limit(np.full(3, images + text), text - 1)
    assert (limit <= images + text).all()
    for words in (1, text) if with_profile else range(1, text + 1):
        needed = budgets.capacity(np.full((3, 1), images + words), np.array([text - words]))
        assert (needed <= limit).all()
    if not with_profile:
        assert (limit - needed <= text).all()
        shortest = budgets.capacity(np.full((3, 1), images + 1), np.array([text - 1]))
        assert (limit - shortest <= 1).all()


# The released code


@settings(deadline=None)
@given(keeps, st.lists(st.integers(1, 4000), min_size=1, max_size=20), st.integers(0, 4))
def test_prompt_of_the_released_elastic_cache(keep: float, entries: list[int], sinks: int) -> None:
    budgets = Budgets.of(changed(REFERENCE, sinks=sinks), 1, keep)
    for n, kept in zip(entries, budgets.prompt(array(entries))[0], strict=True):
        forget = int(n - n * (1 - (1 - keep)))
        if forget <= 0:
            assert kept == n
        elif forget == 1:
            assert kept == n - 1
        else:
            assert kept == min(n, max(n - 1 - forget, sinks + 1))


def test_the_released_code_keeps_one_less() -> None:
    kept = Budgets.of(REFERENCE, 1, 0.5).prompt(array([100, 10, 3, 2, 1]))
    assert kept.tolist() == [[49, 4, 2, 1, 1]]


@settings(deadline=None)
@given(seeds, keeps, st.lists(st.integers(1, 4000), min_size=1, max_size=20), st.integers(0, 4))
def test_prompt_of_the_released_prefixkv(
    seed: int, keep: float, entries: list[int], sinks: int
) -> None:
    budgets = profiled(np.random.default_rng(seed), 3, keep, semantics="reference", sinks=sinks)
    kept = budgets.prompt(array(entries, entries, entries))
    for layer, fraction in enumerate(budgets.fractions[:, 0].tolist()):
        for n, count in zip(entries, kept[layer], strict=True):
            assert count == max(n - round((1 - fraction) * n), min(n, sinks + 1))


@settings(deadline=None)
@given(keeps, st.integers(1, 4000), st.integers(0, 4000))
def test_the_released_code_evicts_by_its_own_sum(keep: float, seen: int, length: int) -> None:
    budget = Budgets.of(REFERENCE, 1, keep).step(array([seen])).item()
    length = min(length, seen)
    evicts = int(length - seen * (1 - (1 - keep))) >= 1
    assert (length > budget) == (evicts and length > 1)  # the sink stays


def test_a_cap_holds_for_the_released_code_too() -> None:
    assert Budgets.of(changed(REFERENCE, cap=9), 1, 0.5).prompt(array([100, 10])).tolist() == [
        [9, 4]
    ]


# What must be allocated; that decode occupies exactly this is tested with the cache


def test_capacity_by_hand() -> None:
    fixed = Budgets.of(UNIFORM, 1, 0.5)
    # 10 entries leave 5, the budget of 10; the victim of a step waits for the next one
    expected = [5, 6, 7, 7, 8, 8, 9]
    got = [fixed.capacity(array([10]), np.array([t])).item() for t in range(7)]
    assert got == expected
    assert fixed.capacity(array([10, 4]), np.array([1, 20])).tolist() == [13]

    cache_policy = changed(INTERVAL, sinks=1, recent=1, queries=1, floor=0, interval=4)
    interval = Budgets.of(cache_policy, 1, 0.5)
    expected = [5, 6, 7, 8, 9, 9, 9, 10, 11, 11, 11, 12, 13]
    got = [interval.capacity(array([10]), np.array([t])).item() for t in range(13)]
    assert got == expected


@settings(deadline=None)
@given(seeds, keeps, st.integers(2, 90), st.integers(0, 60), st.booleans(), st.booleans())
def test_the_limit_holds_however_a_text_is_divided(
    seed: int, keep: float, most: int, cap: int, with_profile: bool, capped: bool
) -> None:
    rng = np.random.default_rng(seed)
    changes: dict[str, Any] = {"cap": 2 + cap if capped else None, "sinks": 1, "recent": 1}
    if with_profile:
        changes["profile"] = (profile_of(rng, 3, 0.3),)
    interval = changed(INTERVAL, sinks=1, recent=1, floor=5, queries=1, interval=7)
    sliding, appended = changed(SLIDING, sinks=1), APPENDED
    for start in (UNIFORM, REFERENCE, interval, sliding, appended, None):
        if start is appended:
            changes |= {"recent": 2, "sinks": 0}
        cache_policy = None if start is None else changed(start, **changes)
        budgets = Budgets.of(cache_policy, 3, None if start is None else keep)
        limit = budgets.limit(np.full(3, most), most - 1)
        for prompt in range(1, most + 1):
            entries = np.full((3, 1), prompt)
            assert (budgets.capacity(entries, np.array([most - prompt])) <= limit).all()


@settings(deadline=None)
@given(seeds, keeps, st.integers(0, 60), st.sampled_from([None, UNIFORM, REFERENCE, INTERVAL]))
def test_room_is_the_most_that_fits(
    seed: int, keep: float, most: int, cache_policy: CachePolicy | None
) -> None:
    rng = np.random.default_rng(seed)
    if cache_policy is INTERVAL:
        cache_policy = changed(INTERVAL, floor=5, queries=1, recent=2, interval=7)
    budgets = Budgets.of(cache_policy, 3, None if cache_policy is None else keep)
    entries = rng.integers(1, 80, 3)
    prompt = budgets.prompt(entries[:, None])[:, 0]
    capacities = prompt + rng.integers(-1, 30, 3)
    room = budgets.room(entries, capacities, most)
    fitting = [
        t
        for t in range(1, most + 1)
        if (budgets.capacity(entries[:, None], np.array([t])) <= capacities).all()
    ]
    assert room == max(fitting, default=0)
    assert fitting == list(range(1, room + 1))
