"""What must be allocated; that decode occupies exactly this is tested with the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from budget_cases import REFERENCE, array, keeps, profile_of, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import APPENDED, INTERVAL, SLIDING, UNIFORM, changed

from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.policies.policy import CachePolicy


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
