"""Model: the cache is written in place, and used again."""

from __future__ import annotations

import numpy as np
import pytest
from model_tools import IMAGE, OTHER, QUESTION

from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions


@pytest.mark.usefixtures("endless")
def test_decode_writes_one_slot_in_place(light: Model) -> None:
    prompts = [
        light.prepare(0, QUESTION, [IMAGE], GenerationOptions()),
        light.prepare(1, "Read the top row.", [IMAGE, OTHER], GenerationOptions()),
    ]
    batch = light.calls.start(prompts)
    cache = batch.cache
    addresses = {name: b.ctypes.data for name, b in cache.buffers.items()}
    allocated = cache.bytes_allocated
    for _ in range(5):
        before = {name: b.copy() for name, b in cache.buffers.items()}
        index, _ = cache.next_slot()
        ring = cache.query_index
        batch.choose(range(2))
        batch.decode_step()
        for name, buffer in cache.buffers.items():
            layer = int(name.rpartition("_")[2])
            changed = (buffer != before[name]).any((1, 3))
            for row in range(2):
                slot = ring[row] if name.startswith("query") else index[layer, row]
                assert np.flatnonzero(changed[row]).tolist() == [slot]
        np.testing.assert_array_equal(cache.lengths, index + 1)
    assert {name: b.ctypes.data for name, b in cache.buffers.items()} == addresses
    assert cache.bytes_allocated == allocated == sum(b.nbytes for b in cache.buffers.values())


def test_buffers_are_used_again(light: Model) -> None:
    prompt = light.prepare(0, QUESTION, [IMAGE], GenerationOptions())
    first = light.calls.start([prompt]).cache
    assert light.calls.start([prompt]).cache is first
    assert light.calls.start([prompt, prompt]).cache is not first
