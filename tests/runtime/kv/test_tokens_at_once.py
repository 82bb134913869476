"""Tokens counted at once: what each of them sees, and what lies where afterwards, is what decode
leaves step by step, with lists from which entries are really deleted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from cache_playback import FIXED_POINT, INTERVAL, Call, Playback, calls, compact, compact_list
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import APPENDED, SLIDING, removed

from lvlm.runtime.kv.slot_counts import SlotCounts
from lvlm.runtime.kv.tokens_at_once import TokensAtOnce, at_once
from lvlm.runtime.policies.evictions import OneByOne

ALL = st.one_of(*(calls(start, 30, 40) for start in (FIXED_POINT, SLIDING, APPENDED, INTERVAL)))


def one_row(call: Call) -> Call:
    return replace(call, entries=call.entries[:, :1], tokens=np.maximum(call.tokens[:1], 1))


@settings(deadline=None, max_examples=examples(150))
@given(ALL, st.data())
def test_what_is_counted_at_once_is_what_decode_does(call: Call, data: st.DataObject) -> None:
    playback = Playback(one_row(call))
    apart, left = playback.cache.row(0), int(playback.call.tokens[0])
    while left:
        most = min(left, apart.until_compaction or left)
        tokens = data.draw(st.integers(1, most))
        check_at_once(playback, apart, tokens)
        left -= tokens


def check_at_once(playback: Playback, apart: SlotCounts, tokens: int) -> None:
    ids, ring = playback.ids[:, 0].copy(), playback.ring[:, 0].copy()
    found = at_once(apart, tokens)
    seen, positions = [], []
    for _ in range(tokens):
        positions.append(playback.cache.positions(np.zeros(1, np.int64))[0])
        before = {at: list(entries) for at, entries in playback.lists.items()}
        playback.decode()
        seen.append([{e.id for e in [*before[at], playback.lists[at][-1]]} for at in before])
        evict(playback)
    compare(playback, apart, found, ids, ring, seen)
    if found.positions is not None:
        assert found.positions.tolist() == positions
    # Only now: the cache of the playback, too, is compacted by what the counts apart say
    theirs, ours = playback.cache.compaction(), apart.compaction()
    assert (theirs is None) == (ours is None)
    if theirs is not None and ours is not None:
        assert all(np.array_equal(theirs[name], ours[name]) for name in theirs)
        compact(playback, theirs)
        for at in playback.lists:
            compact_list(playback, at, int(theirs["kv_budget"][at]))
        playback.cache.compacted()
        apart.compacted()


def evict(playback: Playback) -> None:
    policy = playback.call.cache_policy
    for (layer, row), entries in playback.lists.items():
        if isinstance(policy.decode, OneByOne) and len(entries) > playback.budget(layer, row):
            entries.pop(removed(policy, int(playback.kept[layer, row])))


def compare(
    playback: Playback,
    apart: SlotCounts,
    found: TokensAtOnce,
    ids: np.ndarray,
    ring: np.ndarray,
    seen: list[list[set[int]]],
) -> None:
    """``ids`` [L,slots] and ``ring`` [L,queries] were there before, ``seen`` [T][L] by lists."""
    tokens, cache = len(seen), playback.cache
    for name in ("lengths", "seen", "victims", "steps", "entries"):
        assert np.array_equal(getattr(apart, name), getattr(cache, name)), name
    for layer in range(playback.layers):
        past = ids[layer][found.inputs[f"past_slots_{layer}"]]
        first = int(playback.call.entries[layer, 0] + playback.fed[0]) - tokens
        new = np.arange(first, first + tokens)
        leaves = found.inputs[f"past_until_{layer}"], found.inputs["new_until"][layer]
        for token in range(tokens):
            own = new[: token + 1][leaves[1][: token + 1] > token]
            assert {*past[leaves[0] > token], *own} == seen[token][layer], (layer, token)
        start, length = int(found.inputs["write_index"][layer, 0]), int(apart.lengths[layer, 0])
        slots = ids[layer, :start].tolist()
        slots += np.concatenate([past, new])[found.inputs[f"written_{layer}"]].tolist()
        assert slots == playback.ids[layer, 0, :length].tolist()
        if ring.shape[1]:
            behind = np.concatenate([ring[layer], new])[found.inputs["ring_slots"]]
            assert behind.tolist() == playback.ring[layer, 0].tolist()
