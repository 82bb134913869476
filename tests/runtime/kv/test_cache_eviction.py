"""A cache that appends or lets one entry go a step, against lists."""

from __future__ import annotations

import numpy as np
from cache_playback import FIXED_POINT, Call, Playback, calls, new_cache
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import APPENDED, SLIDING, changed, removed

from lvlm.runtime.kv.budgets import Budgets

# Appending


@settings(deadline=None, max_examples=examples(30))
@given(calls(APPENDED, 30, 40))
def test_appended_entries_all_stay(call: Call) -> None:
    playback = Playback(call)
    assert call.cache_policy.queries == 0
    for _ in range(call.tokens.max() + 1):
        playback.decode()
        playback.compare()
        assert playback.cache.compaction() is None
    expected = playback.kept + call.tokens
    assert [
        [len(playback.lists[at, row]) for row in range(playback.rows)]
        for at in range(playback.layers)
    ] == expected.tolist()


# Elimination one by one


@settings(deadline=None, max_examples=examples(100))
@given(st.one_of(calls(FIXED_POINT, 30, 40), calls(SLIDING, 30, 40)))
def test_elimination_one_by_one(call: Call) -> None:
    playback = Playback(call)
    playback.compare()
    c = call.cache_policy
    for _ in range(call.tokens.max() + 1):
        running = playback.decode()
        for (layer, row), entries in playback.lists.items():
            if running[row] and len(entries) > playback.budget(layer, row):
                entries.pop(removed(c, int(playback.kept[layer, row])))
        playback.compare()


def test_victims_by_hand() -> None:
    """10 entries leave 5; from the third on they go, first in, first out, then the answer's."""
    cache_policy = changed(FIXED_POINT, keep=0.5, distance=3, positions="layer0")
    cache = new_cache([12], Budgets.of(cache_policy, 1, None), batch=1)
    cache.begin(np.array([[10]]), np.array([[5]]))
    indices, valid_lengths, positions, used = [], [], [], []
    for _ in range(13):
        index, valid = cache.next_slot()
        indices.append(index.item())
        valid_lengths.append(valid.item())
        positions.append(cache.positions(np.array([99])).item())
        used.append(cache.bytes_used(0) // (2 * 2 * 3 * 2))
        cache.advance(np.array([True]))
    # Every second token raises the budget and takes a new slot. Slot 2 goes twice: the second time
    # after 3 to 6, because what it holds by then is younger.
    assert indices == [5, 6, 2, 7, 3, 8, 4, 9, 5, 10, 6, 11, 2]
    assert valid_lengths == [6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12]
    assert positions == used == [5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11]


def test_sinks_that_the_answer_gives_never_leave() -> None:
    """A prompt of 2 entries and 4 sinks: the first two tokens of the answer are sinks, too."""
    cache = new_cache([20], Budgets.of(SLIDING, 1, 0.3), batch=1)
    cache.begin(np.array([[2]]), np.array([[2]]))
    slots = []
    for _ in range(8):
        slots.append(int(cache.next_slot()[0][0, 0]))
        cache.advance(np.array([True]))
    assert slots == [2, 3, 4, 5, 4, 5, 4, 5]  # 0 to 3 stay, and the latest one beside the next
