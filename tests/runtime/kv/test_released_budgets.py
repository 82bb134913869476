"""Cache budgets as the released code has them."""

from __future__ import annotations

import numpy as np
from budget_cases import REFERENCE, array, keeps, profiled, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import UNIFORM, changed

from lvlm.runtime.kv.budgets import Budgets


def test_the_released_code_guards_no_sink() -> None:
    cache_policy = changed(UNIFORM, distance=25, sinks=4, semantics="reference")
    point = Budgets.of(cache_policy, 1, None).fixed_point(array([100, 27, 26, 9, 5, 2]))
    assert point.tolist() == [[75, 2, 1, 4, 2, 1]]
    assert point.dtype == np.int64


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
