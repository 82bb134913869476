"""A cache that is compacted at intervals, against lists."""

from __future__ import annotations

import numpy as np
from cache_playback import INTERVAL, Call, Playback, calls, compact, compact_list, new_cache
from example_counts import examples
from hypothesis import given, settings
from policies import changed

from lvlm.runtime.kv.budgets import Budgets


@settings(deadline=None, max_examples=examples(100))
@given(calls(INTERVAL, 30, 40))
def test_compaction_at_intervals(call: Call) -> None:
    playback = Playback(call)
    playback.compare()
    cache, c = playback.cache, call.cache_policy
    assert c.interval is not None
    assert cache.compaction() is None
    for _ in range(call.tokens.max() + 1):
        running = playback.decode()
        playback.compare()
        due = running & (playback.fed % c.interval == 0)
        lengths = {at: len(entries) for at, entries in playback.lists.items()}
        budgets = {
            at: min(length, playback.budget(*at)) if due[at[1]] else length
            for at, length in lengths.items()
        }
        inputs = cache.compaction()
        if budgets == lengths:
            assert inputs is None
            continue
        assert inputs is not None
        check_inputs(playback, inputs, lengths, budgets, due)
        compact(playback, inputs)
        for at, budget in budgets.items():
            compact_list(playback, at, budget)
        cache.compacted()
        assert cache.compaction() is None
        playback.compare()


def check_inputs(
    playback: Playback,
    inputs: dict[str, np.ndarray],
    lengths: dict[tuple[int, int], int],
    budgets: dict[tuple[int, int], int],
    due: np.ndarray,
) -> None:
    queries = playback.call.cache_policy.queries
    slots = {f"kv_slots_{layer}" for layer in range(playback.layers)}
    assert set(inputs) == {"valid_length", "kv_budget", "query_slot", *slots}
    assert all(array.dtype == np.int64 for array in inputs.values())
    assert inputs["query_slot"].shape == (playback.layers, playback.rows, queries)
    for layer in range(playback.layers):
        most = max(budgets[layer, row] for row in range(playback.rows))
        assert inputs[f"kv_slots_{layer}"].tolist() == list(range(most))
    for layer, row in playback.lists:
        assert inputs["valid_length"][layer, row] == lengths[layer, row]
        assert inputs["kv_budget"][layer, row] == budgets[layer, row]
        for r, slot in enumerate(inputs["query_slot"][layer, row]):
            query = playback.ring[layer, row, r]
            if due[row] and query >= 0:
                assert 0 <= slot < lengths[layer, row]
                assert playback.ids[layer, row, slot] == query
            else:
                assert slot == -1


def test_ring_slots_by_hand() -> None:
    """Prompts of 6 and 2 tokens, 4 queries: the latest ones' own entries are the last ones."""
    cache_policy = changed(INTERVAL, keep=0.01, sinks=0, recent=4, queries=4, interval=3)
    cache = new_cache([10], Budgets.of(cache_policy, 1, None))
    assert cache.buffers["query_0"].shape == (2, 4, 4, 3)
    cache.begin(np.array([[6, 2]]), np.array([[4, 2]]))
    for step in range(3):
        assert cache.compaction() is None
        assert cache.query_index.tolist() == [step, step]
        cache.advance(np.array([True, True]))
    inputs = cache.compaction()
    assert inputs is not None
    assert cache.query_index.tolist() == [3, 3]
    # Slot 3 has kept the prompt's last query; 0, 1, 2 are the new ones, the last entries.
    assert inputs["query_slot"].tolist() == [[[4, 5, 6, 3], [2, 3, 4, 1]]]
    assert inputs["valid_length"].tolist() == [[7, 5]]
    assert inputs["kv_budget"].tolist() == [[4, 4]]
    assert inputs["kv_slots_0"].tolist() == [0, 1, 2, 3]
    ring = 4 * 4 * 3 * 2
    assert cache.bytes_used(0) == 7 * 24 + ring
    cache.compacted()
    assert cache.lengths.tolist() == [[4, 4]]
    assert cache.bytes_used(0) == 4 * 24 + ring


def test_ring_slots_of_a_short_prompt() -> None:
    """Before the fourth token some slots of the ring are empty; the prompt itself is never due."""
    cache_policy = changed(INTERVAL, keep=0.01, sinks=0, recent=4, queries=4, interval=1)
    cache = new_cache([10], Budgets.of(cache_policy, 1, None))
    cache.begin(np.array([[6, 1]]), np.array([[6, 1]]))
    assert cache.compaction() is None
    cache.advance(np.array([True, True]))
    inputs = cache.compaction()
    assert inputs is not None
    assert inputs["query_slot"].tolist() == [[[6, 3, 4, 5], [1, -1, -1, 0]]]
    assert inputs["kv_budget"].tolist() == [[4, 2]]
