"""The compact cache: its buffers, without compression, and what a call occupies of it."""

from __future__ import annotations

import numpy as np
import pytest
from cache_playback import FIXED_POINT, INTERVAL, Call, calls, new_cache
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import APPENDED, SLIDING

from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.cache import CompactCache
from lvlm.runtime.policies.policy import CachePolicy

# Without compression


@pytest.fixture
def cache() -> CompactCache:
    return new_cache([10, 6, 4])


def begin(cache: CompactCache, entries: list[list[int]]) -> None:
    cache.begin(np.array(entries), np.array(entries))


def test_each_layer_has_its_own_capacity(cache: CompactCache) -> None:
    for layer, capacity in enumerate((10, 6, 4)):
        for which in ("key", "value"):
            buffer = cache.buffers[f"{which}_{layer}"]
            assert buffer.shape == (2, 2, capacity, 3)
            assert buffer.dtype == np.float16
    assert len(cache.buffers) == 6


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("cache_policy", [None, FIXED_POINT, INTERVAL])
def test_bytes_allocated_are_those_of_the_buffers(
    dtype: str, cache_policy: CachePolicy | None
) -> None:
    cache = new_cache([10, 6, 4], Budgets.of(cache_policy, 3, None), dtype=dtype)
    assert cache.bytes_allocated == sum(b.nbytes for b in cache.buffers.values())


def test_states_are_of_their_own_types() -> None:
    """Of the cache's where a bundle does not say, as those made before there were others."""
    sizes = (3, 2, 7), (3, 8, 4)
    for types, second in (((), np.float16), (("float16", "float32"), np.float32)):
        cache = new_cache([4, 4, 4], states=sizes, state_dtypes=types)
        first, other = cache.buffers["state_0"], cache.buffers["state_1"]
        assert (first.shape, first.dtype) == ((2, 3, 2, 7), np.float16)
        assert (other.shape, other.dtype) == ((2, 3, 8, 4), second)
        assert cache.bytes_allocated == sum(b.nbytes for b in cache.buffers.values())
        first[0], other[0] = 1.5, 2.5
        cache.begin(np.full((3, 2), 1), np.full((3, 2), 1))
        cache.copy_row(0, 1)
        assert (first[1] == 1.5).all()
        assert (other[1] == 2.5).all()
        assert cache.bytes_used(0) == 3 * cache._entry_bytes + (first.nbytes + other.nbytes) / 2


@pytest.mark.parametrize("cache_policy", [None, INTERVAL])
def test_views_are_the_same_memory(cache_policy: CachePolicy | None) -> None:
    cache = new_cache([10, 6, 4], Budgets.of(cache_policy, 3, None), batch=3)
    views = cache.views(slice(1, 2))
    assert set(views) == set(cache.buffers)
    for name, buffer in cache.buffers.items():
        assert views[name].shape == (1, *buffer.shape[1:])
        assert np.shares_memory(views[name], buffer[1])


def test_slots_follow_the_prompt_row_by_row(cache: CompactCache) -> None:
    begin(cache, [[5, 3], [4, 2], [2, 1]])
    index, valid = cache.next_slot()
    assert index.tolist() == [[5, 3], [4, 2], [2, 1]]
    assert valid.tolist() == [[6, 4], [5, 3], [3, 2]]
    assert index.dtype == valid.dtype == np.int64
    cache.advance(np.array([True, False]))
    index, valid = cache.next_slot()
    assert index.tolist() == [[6, 3], [5, 2], [3, 1]]
    assert cache.lengths.tolist() == [[6, 3], [5, 2], [3, 1]]
    assert cache.seen.tolist() == [[6, 3], [5, 2], [3, 1]]
    assert cache.compaction() is None
    assert cache.positions(np.array([40, 30])).tolist() == [40, 30]


@pytest.mark.parametrize("cache_policy", [None, FIXED_POINT, INTERVAL])
def test_a_full_row_that_has_finished_stays_within_its_buffers(
    cache_policy: CachePolicy | None,
) -> None:
    cache = new_cache([10, 6, 4], Budgets.of(cache_policy, 3, None))
    begin(cache, [[10, 1], [6, 1], [4, 1]])
    for _ in range(2):
        index, valid = cache.next_slot()
        assert index[:, 0].tolist() == [9, 5, 3]
        assert valid[:, 0].tolist() == [10, 6, 4]
        assert index[:, 1].tolist() == [1, 1, 1]
        cache.advance(np.array([False, False]))


def test_bytes_used_are_those_of_the_valid_entries(cache: CompactCache) -> None:
    entry = 2 * 2 * 3 * 2  # key and value, heads, width, bytes
    begin(cache, [[5, 3], [4, 2], [2, 1]])
    assert cache.bytes_used(0) == 11 * entry
    assert cache.bytes_used(1) == 6 * entry
    cache.advance(np.array([True, True]))
    assert cache.bytes_used(0) == 14 * entry
    assert cache.bytes_allocated == 2 * 20 * entry


def test_begin_copies_the_counts(cache: CompactCache) -> None:
    entries = np.array([[5, 3], [4, 2], [2, 1]])
    cache.begin(entries, entries)
    cache.advance(np.array([True, True]))
    assert entries.tolist() == [[5, 3], [4, 2], [2, 1]]


# Capacities and calls one after another


@settings(deadline=None, max_examples=examples(300))
@given(
    st.one_of(*(calls(c, 200, 150) for c in (FIXED_POINT, INTERVAL, SLIDING, APPENDED))),
    st.booleans(),
)
def test_capacity_is_exactly_what_decode_occupies(call: Call, compressed: bool) -> None:
    layers, rows = call.entries.shape
    budgets = call.budgets if compressed else Budgets.of(None, layers, None)
    capacities = budgets.capacity(call.entries, call.tokens)
    cache = new_cache(capacities.tolist(), budgets, rows)
    cache.begin(call.entries, budgets.prompt(call.entries))
    most = cache.lengths.copy()
    for step in range(call.tokens.max()):
        cache.advance(step < call.tokens)
        most = np.maximum(most, cache.lengths)
        if cache.compaction() is not None:
            cache.compacted()
    assert most.max(axis=1).tolist() == capacities.tolist()


@settings(deadline=None, max_examples=examples(50))
@given(st.one_of(calls(FIXED_POINT, 30, 20), calls(INTERVAL, 30, 20)), st.floats(0.01, 1))
def test_a_cache_used_again_is_as_good_as_new(call: Call, keep: float) -> None:
    layers, rows = call.entries.shape
    other = Budgets.of(call.cache_policy, layers, keep)
    capacities = np.maximum(
        call.budgets.capacity(call.entries, call.tokens),
        other.capacity(call.entries, call.tokens),
    ).tolist()
    used, new = new_cache(capacities, call.budgets, rows), new_cache(capacities, other, rows)
    slots = []
    for cache, budgets in ((used, call.budgets), (used, other), (new, other)):
        cache.begin(call.entries, budgets.prompt(call.entries), budgets=budgets)
        slots.append([])
        for step in range(call.tokens.max()):
            slots[-1].append([array.tolist() for array in cache.next_slot()])
            cache.advance(step < call.tokens)
            if cache.compaction() is not None:
                cache.compacted()
    assert slots[1] == slots[2]
