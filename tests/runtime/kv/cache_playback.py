"""One call played back on a cache: real keys and values, written the way the graphs write them, and
beside them lists from which entries are really deleted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from policies import APPENDED, UNIFORM, changed, is_released, least_left

from lvlm.runtime.backends.host.buffers import HostMemory
from lvlm.runtime.bundle.manifest import Manifest, Text
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.cache import CompactCache
from lvlm.runtime.policies.evictions import FixedPoint, Interval
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.scores import Window
from lvlm.runtime.policies.selections import Evict
from lvlm.runtime.policies.shares import ProfileRow, Uniform

TEXT = Text(layers=3, heads=4, kv_heads=2, head_dim=3, hidden=12, vocab=10, eos_ids=(2,))
FIXED_POINT = UNIFORM
INTERVAL = CachePolicy(Window(2), Evict(), Interval(4), Uniform(0.5), sinks=1, recent=2)
FULL = Budgets.of(None, 3, None)


class UnreadMemory(HostMemory):
    """A backend that only allocates, and fills with what nobody may read."""

    name = "host"
    static_capacity = False

    def load(self, folder: object, manifest: Manifest, name: str) -> None: ...

    def allocate(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.full(shape, np.nan, "float16" if dtype == "bfloat16" else dtype)


def new_cache(
    capacities: list[int],
    budgets: Budgets = FULL,
    batch: int = 2,
    dtype: str = "float16",
    states: tuple[tuple[int, ...], ...] = (),
    state_dtypes: tuple[str, ...] = (),
) -> CompactCache:
    text = replace(TEXT, states=states, state_dtypes=state_dtypes)
    return CompactCache(UnreadMemory(), text, dtype, batch, capacities, budgets)


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
        return min(seen, max(share, least_left(c)))

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
