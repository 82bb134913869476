"""The compact cache against lists from which entries are really deleted, with real keys and values
written the way the graphs write them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import APPENDED, SLIDING, UNIFORM, changed, is_released, removed

from lvlm.runtime.backends.host.buffers import HostMemory
from lvlm.runtime.bundle.manifest import Manifest, Text
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.cache import CompactCache
from lvlm.runtime.policies.evictions import FixedPoint, Interval
from lvlm.runtime.policies.policy import CachePolicy, Evict, Window
from lvlm.runtime.policies.shares import ProfileRow, Uniform

TEXT = Text(layers=3, heads=4, kv_heads=2, head_dim=3, hidden=12, vocab=10, eos_ids=(2,))
FIXED_POINT = UNIFORM
INTERVAL = CachePolicy(Window(2), Evict(), Interval(4), Uniform(0.5), sinks=1, recent=2)
FULL = Budgets.of(None, 3, None)


class UnreadMemory(HostMemory):
    """A backend that only allocates, and fills with what nobody may read."""

    name = "host"
    static_capacity = False
    parallel = True

    def load(self, folder: object, manifest: Manifest, name: str) -> None: ...

    def allocate(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.full(shape, np.nan, "float16" if dtype == "bfloat16" else dtype)


def new_cache(
    capacities: list[int], budgets: Budgets = FULL, batch: int = 2, dtype: str = "float16"
) -> CompactCache:
    return CompactCache(UnreadMemory(), TEXT, dtype, batch, capacities, budgets)


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


# Random calls


@dataclass(frozen=True)
class Call:
    """entries [L,B] of the prompts, the tokens [B] fed to each row until it finishes."""

    cache_policy: CachePolicy
    entries: np.ndarray
    tokens: np.ndarray
    seed: int

    @property
    def budgets(self) -> Budgets:
        return Budgets.of(self.cache_policy, len(self.entries), None)


@st.composite
def calls(draw: Any, start: CachePolicy, longest: int, most: int) -> Call:
    layers, rows = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    keep = draw(st.one_of(st.sampled_from([0.25, 0.5, 1.0]), st.floats(0.01, 1)))
    shares = st.lists(st.floats(0.01, 1), min_size=layers, max_size=layers)
    row = draw(st.one_of(st.none(), shares))
    keep = keep if row is None else math.fsum(row) / layers
    sinks = draw(st.integers(0, 4))
    queries = 0 if start.interval is None else draw(st.integers(1, 4))
    least = start.score.queries if start is APPENDED else max(queries, 1)
    recent = draw(st.integers(least, least + 3))
    cap = draw(st.one_of(st.none(), st.integers(sinks + recent, sinks + recent + 15)))
    mode: dict[str, Any] = {}
    if isinstance(start.decode, FixedPoint):
        mode = {"distance": draw(st.integers(0, 12))}
        mode["semantics"] = draw(st.sampled_from(["paper", "reference"]))
    if start.interval is not None:
        mode = {"interval": draw(st.integers(1, 7)), "floor": draw(st.integers(0, 12))}
        mode["queries"] = queries
    cache_policy = changed(
        start,
        keep=keep,
        profile=() if row is None or keep == 1 else (ProfileRow(keep, tuple(row)),),
        cap=cap,
        sinks=sinks,
        recent=recent,
        positions=draw(st.sampled_from(["true", "layer0"])),
        **mode,
    )
    counts = st.lists(st.integers(1, longest), min_size=rows, max_size=rows)
    entries = np.array([draw(counts) for _ in range(layers)])
    tokens = np.array(draw(st.lists(st.integers(0, most), min_size=rows, max_size=rows)))
    return Call(cache_policy, entries, tokens, draw(st.integers(0, 2**32 - 1)))


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """query [H,d] over key and value [H,n,d]."""
    scores = np.einsum("hd,hnd->hn", query, key)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hn,hnd->hd", weights / weights.sum(axis=1, keepdims=True), value)


@dataclass
class Entry:
    """What one layer caches of one token; ids count each layer's tokens from 0."""

    id: int
    key: np.ndarray
    value: np.ndarray


class Playback:
    """The graphs' part of one call, on the cache's buffers; beside it, for every layer and row, a
    list of the entries that there should be, oldest first."""

    def __init__(self, call: Call) -> None:
        self.call, self.rng = call, np.random.default_rng(call.seed)
        self.layers, self.rows = call.entries.shape
        budgets = call.budgets
        capacities = budgets.capacity(call.entries, call.tokens)
        self.cache = CompactCache(
            UnreadMemory(), TEXT, "float32", self.rows, capacities.tolist(), budgets
        )
        # Ids beside the keys and queries: whose is it?
        self.ids = np.full((self.layers, self.rows, capacities.max()), -1)
        self.ring = np.full((self.layers, self.rows, call.cache_policy.queries), -1)
        self.lists: dict[tuple[int, int], list[Entry]] = {}
        self.kept = budgets.prompt(call.entries)
        for (layer, row), kept in np.ndenumerate(self.kept):
            count = int(call.entries[layer, row])
            last = count - min(call.cache_policy.recent, kept)  # protected from here on
            others = self.rng.permutation(last)[: kept - (count - last)]
            entries = [self.entry(i) for i in [*sorted(others.tolist()), *range(last, count)]]
            self.lists[layer, row] = entries
            for slot, entry in enumerate(entries):
                self.write(layer, row, slot, entry)
            asked = min(call.cache_policy.queries, count)
            self.ring[layer, row, self.ring.shape[2] - asked :] = range(count - asked, count)
        self.cache.begin(call.entries, self.kept)
        self.fed = np.zeros(self.rows, int)

    def entry(self, identity: int) -> Entry:
        key, value = self.rng.standard_normal((2, TEXT.kv_heads, TEXT.head_dim), np.float32)
        return Entry(identity, key, value)

    def write(self, layer: int, row: int, slot: int, entry: Entry) -> None:
        self.cache.buffers[f"key_{layer}"][row, :, slot] = entry.key
        self.cache.buffers[f"value_{layer}"][row, :, slot] = entry.value
        self.ids[layer, row, slot] = entry.id

    def decode(self) -> np.ndarray:
        """One step of the decode graph; the rows [B] that still ran."""
        running = self.fed < self.call.tokens
        index, valid = self.cache.next_slot()
        assert (valid <= self.cache.capacities[:, None]).all()
        for layer, row in self.lists:
            # A row that has finished is written too, and must not disturb any other.
            entry = self.entry(int(self.call.entries[layer, row] + self.fed[row]))
            self.write(layer, row, index[layer, row], entry)
            if self.call.cache_policy.queries:
                self.ring[layer, row, self.cache.query_index[row]] = entry.id
            if running[row]:
                entries = self.lists[layer, row]
                entries.append(entry)
                length = valid[layer, row]
                assert sorted(self.ids[layer, row, :length]) == [e.id for e in entries]
                query = self.entry(0).key
                got = attention(
                    query,
                    self.cache.buffers[f"key_{layer}"][row, :, :length],
                    self.cache.buffers[f"value_{layer}"][row, :, :length],
                )
                expected = attention(
                    query,
                    np.stack([e.key for e in entries], axis=1),
                    np.stack([e.value for e in entries], axis=1),
                )
                np.testing.assert_allclose(got, expected, atol=1e-5)
        self.cache.advance(running)
        self.fed += running
        return running

    def budget(self, layer: int, row: int) -> int:
        """Of a layer now, by the rules of ALGORITHMS.md."""
        c = self.call.cache_policy
        seen = int(self.call.entries[layer, row] + self.fed[row])
        rows = getattr(c.budget, "rows", ())
        fraction = rows[0].fractions[layer] if rows else c.budget.keep
        if is_released(c):  # which evicts if int(length - seen * x) >= 1, noise and all
            fraction = 1 - (1 - fraction)
        noise = 0 if is_released(c) else 1e-9
        share = max(math.ceil(fraction * seen - noise), c.decode.floor)
        share = share if c.budget.cap is None else min(share, c.budget.cap)
        least = max(1, c.sinks) if c.interval is None else c.sinks + c.recent
        return min(seen, max(share, least))

    def compare(self) -> None:
        """What the cache counts as entries is what the lists hold."""
        cache = self.cache
        for (layer, row), entries in self.lists.items():
            slots = set(range(cache.lengths[layer, row])) - {int(cache.victims[layer, row])}
            if self.fed[row] < self.call.tokens[row]:
                assert sorted(self.ids[layer, row, list(slots)]) == [e.id for e in entries]
            assert len(slots) == len(entries)
            assert cache.seen[layer, row] == self.call.entries[layer, row] + self.fed[row]
        true = self.call.entries.max(axis=0) + self.fed
        if self.call.cache_policy.positions == "layer0":
            true = np.array([len(self.lists[0, row]) for row in range(self.rows)])
        assert cache.positions(self.call.entries.max(axis=0) + self.fed).tolist() == true.tolist()
        for row in range(self.rows):
            count = sum(len(self.lists[layer, row]) for layer in range(self.layers))
            ring = self.layers * TEXT.heads * self.call.cache_policy.queries
            floats = 2 * TEXT.kv_heads * TEXT.head_dim * count + ring * TEXT.head_dim
            assert cache.bytes_used(row) == 4 * floats


# Appending


@settings(deadline=None, max_examples=30)
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


@settings(deadline=None, max_examples=100)
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


# Compaction of many at a time


@settings(deadline=None, max_examples=100)
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


def importance(playback: Playback, at: tuple[int, int]) -> np.ndarray:
    """Random, by id."""
    return np.random.default_rng((playback.call.seed, *at)).random(100)


def compact(playback: Playback, inputs: dict[str, np.ndarray]) -> None:
    """compact.onnx: the first, the last and the most important entries to the front, in order."""
    c, ids = playback.call.cache_policy, playback.ids
    for at in playback.lists:
        layer, row = at
        length, budget = (int(inputs[name][at]) for name in ("valid_length", "kv_budget"))
        score = importance(playback, at)[ids[layer, row, :length]]
        score[: c.sinks] = score[max(0, length - c.recent) :] = 2
        survivors = np.sort(np.argsort(-score, kind="stable")[:budget])
        ids[layer, row] = [*ids[layer, row, survivors], *[-1] * (ids.shape[2] - budget)]
        for which in ("key", "value"):
            buffer = playback.cache.buffers[f"{which}_{layer}"]
            moved = buffer[row, :, survivors].swapaxes(0, 1)
            buffer[row] = np.nan
            buffer[row, :, :budget] = moved


def compact_list(playback: Playback, at: tuple[int, int], budget: int) -> None:
    """Delete the least important entries that are not protected until the budget holds."""
    c, entries = playback.call.cache_policy, playback.lists[at]
    score = importance(playback, at)
    open_ids = [e.id for e in entries[c.sinks : len(entries) - c.recent]]
    for victim in sorted(open_ids, key=lambda i: score[i])[: len(entries) - budget]:
        entries.remove(next(e for e in entries if e.id == victim))


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


# Capacities and calls one after another


@settings(deadline=None, max_examples=300)
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


@settings(deadline=None, max_examples=50)
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
