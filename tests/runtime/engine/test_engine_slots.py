"""Which row is whose: real keys and values are followed through moves, and every row must go on as
if it had never been moved."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from cache_playback import (
    FIXED_POINT,
    FULL,
    INTERVAL,
    Call,
    Playback,
    calls,
    compact,
    compact_list,
    new_cache,
)
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from policies import removed

from lvlm.runtime.engine.session import Session
from lvlm.runtime.engine.slots import Slots
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.policies.evictions import OneByOne

# Slots alone: no compression, so that prefixes are kept


@dataclass(eq=False)
class Asked:
    """What slots know of a request; ``tokens`` are those of its answer, all of them fed."""

    keys: np.ndarray
    tokens: list[int] = field(default_factory=list)
    session: Session | None = None
    read: None = None

    def held_keys(self) -> np.ndarray:
        return np.concatenate([self.keys, np.array(self.tokens, np.int64)])


def content(keys: np.ndarray, layer: int) -> np.ndarray:
    """What a layer caches of each token [N]: it depends on all tokens before it."""
    known = [hash((layer, *keys[: i + 1].tolist())) % 2**20 for i in range(len(keys))]
    return np.array(known, np.float32)


def state(keys: np.ndarray, number: int) -> float:
    """What stands for a state after these tokens."""
    return float(content(keys, 100 + number)[-1])


KEYS = st.lists(st.integers(0, 1), min_size=2, max_size=5).map(np.array)


class Rows(RuleBasedStateMachine):
    """Requests come and go in every order that the scheduler can bring about."""

    states: tuple[tuple[int, ...], ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.cache = new_cache([12, 12, 12], FULL, batch=3, dtype="float32", states=self.states)
        self.slots: Any = Slots(self.cache, keeps_prefixes=True)
        self.coming: list[Asked] = []

    def write(self, row: int, start: int, keys: np.ndarray) -> None:
        for name, buffer in self.cache.buffers.items():
            layer = int(name.partition("_")[2])
            if name.startswith("state"):
                buffer[row] = state(keys, layer)  # of all, whatever was written before
            else:
                buffer[row, :, start : len(keys)] = content(keys, layer)[None, start:, None]

    @precondition(lambda self: not self.coming)
    @rule(keys=st.lists(KEYS, min_size=2, max_size=3))
    def arrive_together(self, keys: list[np.ndarray]) -> None:
        if not self.slots.room(len(keys)):
            assert len(self.slots.running) + len(keys) > self.slots.count
            return
        rows, prefix = self.slots.reserve(len(keys))
        assert prefix is None
        self.coming = [Asked(each) for each in keys]
        for row, each in enumerate(keys, rows.start):
            self.write(row, 0, each)
            self.begin(row, len(each))

    @precondition(lambda self: not self.coming)
    @rule(keys=KEYS, reuse=st.booleans(), answers=st.integers(1, 3))
    def arrive(self, keys: np.ndarray, reuse: bool, answers: int) -> None:
        if not self.slots.room(answers):
            assert len(self.slots.running) + answers > self.slots.count
            return
        rows, prefix = self.slots.reserve(answers, keys)
        row = rows.start
        self.coming = [Asked(keys) for _ in range(answers)]
        if prefix is not None:
            assert 0 < prefix.length < len(keys)
        if prefix is not None and reuse:
            self.slots.fill_from(prefix)
            for number in range(len(self.states)):  # with which what follows is read
                there = self.cache.buffers[f"state_{number}"][row]
                assert (there == state(keys[: prefix.length], number)).all()
            self.write(row, prefix.length, keys)  # as decode would, bit by bit
        else:
            for buffer in self.cache.buffers.values():
                buffer[row] = np.nan
            self.write(row, 0, keys)
        self.begin(row, len(keys))
        self.slots.fork([0] * answers)

    def begin(self, row: int, count: int) -> None:
        counts = np.full((3, 1), count)
        self.cache.begin(counts, counts, slice(row, row + 1))

    @precondition(lambda self: self.coming)
    @rule(fails=st.booleans())
    def filled(self, fails: bool) -> None:
        if fails:
            self.slots.abandon()
        else:
            places = self.slots.start(self.coming)
            assert list(places) == list(range(len(self.slots.running)))[-len(self.coming) :]
        self.coming = []

    @precondition(lambda self: self.slots.running)
    @rule(token=st.integers(0, 1))
    def step(self, token: int) -> None:
        for row, request in enumerate(self.slots.running):
            if len(request.held_keys()) < 12:
                request.tokens.append(token)
                self.write(row, len(request.held_keys()) - 1, request.held_keys())
                advanced = np.zeros(3, bool)
                advanced[row] = True
                self.cache.advance(advanced)

    @precondition(lambda self: self.slots.running)
    @rule(place=st.integers(0, 2), keep=st.booleans())
    def leave(self, place: int, keep: bool) -> None:
        self.slots.release(place % len(self.slots.running), keep=keep)

    @invariant()
    def every_row_holds_its_own(self) -> None:
        self.slots.check()
        held = {row: r.held_keys() for row, r in enumerate(self.slots.running)}
        held |= {row: kept.keys for row, kept in self.slots.kept.items()}
        held |= {r: a.keys for r, a in zip(self.slots.filling, self.coming, strict=True)}
        for row, keys in held.items():
            assert (self.cache.lengths[:, row] == len(keys)).all()
            for name, buffer in self.cache.buffers.items():
                layer = int(name.partition("_")[2])
                if name.startswith("state"):
                    assert (buffer[row] == state(keys, layer)).all()
                    continue
                expected = content(keys, layer)
                assert (buffer[row, :, : len(keys)] == expected[None, :, None]).all()


class RowsWithStates(Rows):
    """Where layers have states, too: of a row with all of its tokens."""

    states = ((1, 2, 3), (2, 1, 4))


OFTEN = settings(deadline=None, max_examples=examples(60), stateful_step_count=30, derandomize=True)
TestRows = Rows.TestCase
TestRows.settings = OFTEN
TestRowsWithStates = RowsWithStates.TestCase
TestRowsWithStates.settings = OFTEN


def test_the_longest_prefix_wins_and_the_least_used_goes() -> None:
    slots: Any = Slots(new_cache([9], batch=3), keeps_prefixes=True)

    def run(*keys: int) -> int:
        """How much of it is there already."""
        rows, prefix = slots.reserve(1, np.array(keys))
        count = np.full((1, 1), len(keys))
        slots.cache.begin(count, count, rows)
        (place,) = slots.start([Asked(np.array(keys))])
        slots.release(place, keep=True)
        return 0 if prefix is None else int(prefix.length)

    assert [run(1, 2, 3), run(4, 5, 6), run(7, 8)] == [0, 0, 0]
    assert sorted(k.keys.tolist() for k in slots.kept.values()) == [[1, 2, 3], [4, 5, 6], [7, 8]]
    assert run(1, 2, 3, 9) == 3  # 1, 2, 3 is used again; 4, 5, 6 is the one that goes
    assert sorted(k.keys.tolist() for k in slots.kept.values()) == [[1, 2, 3], [1, 2, 3, 9], [7, 8]]
    assert run(1, 2, 3, 9) == 3  # never all: its last token must be read for the next one
    slots.keeps_prefixes = False
    assert run(1, 2, 3) == 0


# Rows of the cache under all compressions


def with_a_spare_row(call: Call) -> Call:
    entries = np.hstack([call.entries, np.ones_like(call.entries[:, :1])])
    return replace(call, entries=entries, tokens=np.append(call.tokens, 0))


def move(playback: Playback, source: int, target: int) -> None:
    """As the engine does between two steps; what stays behind has finished."""
    call = playback.call
    playback.cache.copy_row(source, target)
    for state in (call.entries, playback.kept, playback.ids, playback.ring):
        state[:, target] = state[:, source]
    call.tokens[target], playback.fed[target] = call.tokens[source], playback.fed[source]
    call.tokens[source] = playback.fed[source]
    for layer in range(playback.layers):
        playback.lists[layer, target] = list(playback.lists[layer, source])


@settings(deadline=None, max_examples=examples(60), derandomize=True)
@given(st.one_of(calls(FIXED_POINT, 30, 30), calls(INTERVAL, 30, 30)), st.data())
def test_a_row_that_was_moved_goes_on_the_same(call: Call, data: st.DataObject) -> None:
    """Victims and their queues, intervals and rings move with it."""
    playback = Playback(with_a_spare_row(call))
    cache, spare = playback.cache, playback.rows - 1
    for _ in range(call.tokens.max() + 1):
        running = playback.decode()
        for (layer, row), entries in playback.lists.items():
            c = call.cache_policy
            one_by_one = isinstance(c.decode, OneByOne) and running[row]
            if one_by_one and len(entries) > playback.budget(layer, row):
                entries.pop(removed(c, int(playback.kept[layer, row])))
        if (inputs := cache.compaction()) is not None:
            compact(playback, inputs)
            for at in playback.lists:
                compact_list(playback, at, int(inputs["kv_budget"][at]))
            cache.compacted()
        playback.compare()
        if data.draw(st.booleans()):
            row = data.draw(st.integers(0, playback.rows - 1))
            if row != spare:
                move(playback, row, spare)
                spare = row
            playback.compare()


@pytest.mark.parametrize("cache_policy", [None, FIXED_POINT, INTERVAL])
def test_all_of_a_row_is_copied_and_cleared(cache_policy: Any) -> None:
    """Rings whole, budgets of its own; entries as far as there are any."""
    cache = new_cache([8, 6, 5], Budgets.of(cache_policy, 3, None), batch=3)
    keep = None if cache_policy is None else 0.9
    counts = np.array([[4], [3], [2]])
    cache.begin(counts, counts, slice(1, 2), Budgets.of(cache_policy, 3, keep))
    for buffer in cache.buffers.values():
        buffer[1] = np.random.default_rng(3).random(buffer[1].shape)
    cache.copy_row(1, 2)
    for name, buffer in cache.buffers.items():
        which, _, layer = name.partition("_")
        used = buffer.shape[2] if which == "query" else cache.lengths[int(layer), 1]
        np.testing.assert_array_equal(buffer[2, :, :used], buffer[1, :, :used])
        assert np.isnan(buffer[0]).all()
    assert cache.budgets.fractions[:, 2].tolist() == cache.budgets.fractions[:, 1].tolist()
    if cache_policy is not None:
        assert (cache.budgets.fractions[:, 0] != cache.budgets.fractions[:, 2]).all()
    cache.clear_row(2)
    assert not any(buffer[2].any() for buffer in cache.buffers.values())
    assert all(buffer[1].all() for buffer in cache.buffers.values())
