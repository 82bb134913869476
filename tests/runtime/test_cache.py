"""The compact cache: shapes, slots, counts."""

from __future__ import annotations

import numpy as np
import pytest

from lvlm.runtime.bundle import Graph
from lvlm.runtime.cache import CompactCache


class HostMemory:
    """A backend that only allocates."""

    name = "host"

    def load(self, folder: object, graph: Graph) -> None: ...

    def allocate(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.zeros(shape, dtype)


@pytest.fixture
def cache() -> CompactCache:
    return CompactCache(HostMemory(), 2, 3, 8, "float16", [10, 6, 4])


def test_each_layer_has_its_own_capacity(cache: CompactCache) -> None:
    for layer, capacity in enumerate((10, 6, 4)):
        for which in ("key", "value"):
            buffer = cache.buffers[f"{which}_{layer}"]
            assert buffer.shape == (2, 3, capacity, 8)
            assert buffer.dtype == np.float16
    assert len(cache.buffers) == 6
    assert cache.bytes_allocated == sum(b.nbytes for b in cache.buffers.values())


def test_past_and_present_are_the_same_memory(cache: CompactCache) -> None:
    past, present = cache.as_past(), cache.as_present()
    assert set(past) == {f"past_{name}" for name in cache.buffers}
    assert set(present) == {f"present_{name}" for name in cache.buffers}
    for name, buffer in cache.buffers.items():
        assert past[f"past_{name}"] is buffer
        assert present[f"present_{name}"] is buffer


def test_slots_follow_the_prompt_row_by_row(cache: CompactCache) -> None:
    cache.begin(np.array([[5, 3], [4, 2], [2, 1]]))
    index, valid = cache.next_slot()
    assert index.tolist() == [[5, 3], [4, 2], [2, 1]]
    assert valid.tolist() == [[6, 4], [5, 3], [3, 2]]
    assert index.dtype == valid.dtype == np.int64
    cache.advance(np.array([True, False]))
    index, valid = cache.next_slot()
    assert index.tolist() == [[6, 3], [5, 2], [3, 1]]
    assert cache.lengths.tolist() == [[6, 3], [5, 2], [3, 1]]


def test_a_full_row_that_has_finished_stays_within_its_buffers(cache: CompactCache) -> None:
    cache.begin(np.array([[10, 1], [6, 1], [4, 1]]))
    index, valid = cache.next_slot()
    assert index[:, 0].tolist() == [9, 5, 3]
    assert valid[:, 0].tolist() == [10, 6, 4]
    assert index[:, 1].tolist() == [1, 1, 1]


def test_bytes_used_are_those_of_the_valid_entries(cache: CompactCache) -> None:
    entry = 2 * 3 * 8 * 2  # key and value, heads, width, bytes
    cache.begin(np.array([[5, 3], [4, 2], [2, 1]]))
    assert cache.bytes_used(0) == 11 * entry
    assert cache.bytes_used(1) == 6 * entry
    cache.advance(np.array([True, True]))
    assert cache.bytes_used(0) == 14 * entry
    assert cache.bytes_allocated == 2 * 20 * entry


def test_begin_copies_the_counts(cache: CompactCache) -> None:
    entries = np.array([[5, 3], [4, 2], [2, 1]])
    cache.begin(entries)
    cache.advance(np.array([True, True]))
    assert entries.tolist() == [[5, 3], [4, 2], [2, 1]]
