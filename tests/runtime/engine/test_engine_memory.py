"""What an engine takes: said before anything is allocated, and never more."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_tools import IMAGES, scheduler
from hypothesis import given
from hypothesis import strategies as st
from settings import CACHED, LIGHTVLM

from lvlm.core.errors import DeviceMemoryError, ParameterError
from lvlm.runtime.bundle.manifest import Capacity, Manifest
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.engine import Engine
from lvlm.runtime.engine.memory_plan import byte_size, plan_memory, slot_capacity

RECIPES = {"none": ("none",), "lightvlm": LIGHTVLM, **CACHED}


@pytest.mark.parametrize("recipe", ["none", "lightvlm", "lightvlm (cached)", "uniform (cached)"])
def test_the_plan_is_what_is_allocated(recipe: str, bundle: Callable[..., Path]) -> None:
    folder = bundle("digits-llava", *RECIPES[recipe], max_images=2)
    lower = {"kv_keep": 0.5} if recipe in CACHED else {}
    with Engine(folder, slots=3) as whole, Engine(folder, slots=3, max_images=1, **lower) as less:
        for engine in (whole, less):
            memory = engine.memory()
            cache = scheduler(engine).batch.slots.cache
            assert cache.bytes_allocated == memory.cache == 3 * memory.slot
            assert sum(b.nbytes for b in cache.buffers.values()) == memory.cache
            stored = sum(w.bytes for w in engine.manifest.weights.values())
            assert memory.weights == stored <= (folder / "weights.bin").stat().st_size
            parts = (memory.weights, memory.cache, memory.workspace, memory.images)
            assert memory.total == sum(parts)
            assert memory.images == 64_000_000
        assert less.memory().slot < whole.memory().slot
        answer = less.generate("Describe the picture.", IMAGES[:1], max_new_tokens=3)
        assert answer.stats.cache_bytes_allocated == less.memory().slot
        assert 0 < answer.stats.cache_bytes_used < less.memory().slot


@pytest.fixture(scope="module")
def manifest(bundle: Callable[..., Path]) -> Manifest:
    """Of a cache that is large beside all else."""
    small = read_bundle(bundle("digits-llava", *CACHED["elastic-cache (cached)"], max_images=2))
    text = replace(small.text, layers=32, heads=32, kv_heads=8, head_dim=128, hidden=4096)
    capacity = Capacity(4096, 1, (4096 + small.images.tokens,) * 32)
    return replace(small, text=text, capacity=capacity)


def test_a_fifth_of_the_cache_is_five_times_the_requests(manifest: Manifest) -> None:
    def slots(keep: float) -> int:
        capacity = slot_capacity(manifest, None, None, None, keep)
        return plan_memory(manifest, capacity, None, "64GB", 0).slots

    assert 4.5 < slots(0.2) / slots(1.0) < 5.5


def test_patches_that_attend_to_one_another_count(manifest: Manifest) -> None:
    """Of an image that has few tokens: in heads, all over all."""
    many = replace(manifest, images=replace(manifest.images, patches=4096, patch_heads=16))
    known, more = (plan_memory(m, m.capacity, 1, None, 0).workspace for m in (manifest, many))
    assert more - known > 4 * 16 * 4096**2


@given(st.integers(10**9, 10**12), st.sampled_from([0, 1_000_000, "64MB"]))
def test_as_many_slots_as_fit(manifest: Manifest, budget: int, images: int | str) -> None:
    capacity = slot_capacity(manifest, 1024, None, None, 0.5)
    planned = plan_memory(manifest, capacity, None, budget, images)
    assert planned.total <= budget
    assert plan_memory(manifest, capacity, planned.slots + 1, None, images).total > budget
    assert plan_memory(manifest, capacity, planned.slots, budget, images) == planned
    slots, size = np.int64(planned.slots), np.int64(budget)
    assert plan_memory(manifest, capacity, slots, size, images) == planned  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match=f"but {planned.slots + 1} slots of"):
        plan_memory(manifest, capacity, planned.slots + 1, budget, images)


def test_too_little_says_what_is_needed(manifest: Manifest, bundle: Callable[..., Path]) -> None:
    with pytest.raises(
        ParameterError,
        match=r"^memory_budget is 100 MB, but 1 slot of [\d,]+ MB need [\d,]+ MB \(weights \d+ MB, "
        r"workspace [\d,]+ MB, images 64 MB\); give more, or a smaller max_text_len, max_im",
    ):
        plan_memory(manifest, manifest.capacity, None, "100MB", "64MB")
    folder = bundle("digits-llava", max_images=2)
    for wrong in ({"slots": 0}, {"slots": True}, {"slots": 2.0}, {"memory_budget": "1kB"}):
        with pytest.raises(ParameterError, match=r"slots is|memory_budget is"):
            Engine(folder, **wrong)  # type: ignore[arg-type]
    # True is no number, "no" no switch
    for name, odd in (("keep", True), ("kv_keep", True), ("keep", "x"), ("reuse_prefixes", "no")):
        with pytest.raises(ParameterError, match=f"^{name} is "):
            Engine(folder, **{name: odd})  # type: ignore[arg-type]


def test_neither_slots_nor_budget(manifest: Manifest) -> None:
    assert plan_memory(manifest, manifest.capacity, None, None, 0).slots == 4


def test_more_slots_than_any_machine_has_memory_for(bundle: Callable[..., Path]) -> None:
    with pytest.raises(DeviceMemoryError, match=r"\(batch of 1000000000\) needs .* fewer prompts"):
        Engine(bundle("digits-llava", max_images=2), slots=10**9)


def test_slots_smaller_than_the_bundles(manifest: Manifest) -> None:
    whole = slot_capacity(manifest, None, None, None, None)
    assert whole == manifest.capacity
    less = slot_capacity(manifest, 1000, 1, None, 0.25)
    assert (less.max_text_len, less.max_images) == (1000, 1)
    assert max(less.per_layer) < 0.26 * (1000 + manifest.images.tokens) + 30
    for name, value in (("max_text_len", 5000), ("max_images", 2), ("max_text_len", 0)):
        given = {"max_text_len": None, "max_images": None} | {name: value}
        with pytest.raises(ParameterError, match=rf"{name} is {value}; give 1 to \d+, as the bun"):
            slot_capacity(manifest, keep=None, kv_keep=None, **given)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="kv_keep"):
        slot_capacity(manifest, None, None, None, 1.5)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("512MiB", 2**29), (" 1.5 kb", 1500), ("7", 7), (0, 0), (12, 12)],
)
def test_sizes(text: int | str, size: int) -> None:
    assert byte_size("memory_budget", text) == size


@pytest.mark.parametrize("text", ["", "2 TB", "-1", -1, True, "1.2.3GB", "GB", "infGB", 1.5, "9e9"])
def test_sizes_that_are_none(text: object) -> None:
    with pytest.raises(ParameterError, match=r"image_cache is .*; give a size as 2GB, 512MiB or"):
        byte_size("image_cache", text)  # type: ignore[arg-type]


GROWTH = Path(__file__).with_name("engine_growth.py")
# Python's objects are malloc's, too, and no thread keeps freed memory for itself: so that malloc
# knows what is held
COUNTED = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_nothing_grows(bundle: Callable[..., Path], stress_steps: int) -> None:
    """Conversations with several answers, requests of mixed lengths, some cancelled, out of time or
    refused: what is held after a round comes to rest."""
    rounds = 7 if stress_steps < 1000 else 80
    folder = bundle("digits-llava", max_images=2)
    done = subprocess.run(
        [sys.executable, str(GROWTH), str(folder), str(rounds), *map(str, IMAGES)],
        env=os.environ | COUNTED,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    seen, reused = json.loads(done.stdout)
    assert reused > 100 * rounds  # what conversations had read before
    held, threads, files = zip(*seen, strict=True)
    assert threads[-1] == threads[1]
    assert files[-1] == files[1]
    # The first rounds meet new lengths, of which numpy and ONNX Runtime keep a little each. A
    # round has some 30 requests; the arena may grow in a single one.
    assert np.median(np.diff(held)[3:]) < 16_000, held
