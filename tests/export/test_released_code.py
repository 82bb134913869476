"""semantics=reference against what the papers' released code did (tests/data/caches/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvlm.export.ops._contract import Sample
from lvlm.export.ops._model import feeds, session, single_node_model
from lvlm.export.ops.cache_compact import OP as CACHE_COMPACT
from lvlm.export.recipes._cache import CacheRule
from lvlm.export.recipes.elastic_cache import ElasticCache
from lvlm.export.recipes.prefixkv import PrefixKV
from lvlm.runtime.budgets import Budgets
from lvlm.runtime.bundle import ProfileRow, Text
from lvlm.runtime.cache import CompactCache

VECTORS = sorted((Path(__file__).parents[1] / "data/caches").glob("*.npz"))


class HostMemory:
    name = "host"

    def load(self, folder: Any, graph: Any) -> Any: ...

    def allocate(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.zeros(shape, dtype)


def load(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], CacheRule, Budgets]:
    """meta, arrays, and the recipe's rule and budgets for the same setting."""
    arrays = dict(np.load(path))
    meta = json.loads(str(arrays.pop("meta")))
    keep = 1 - meta["evicted_fraction"]
    recipe: ElasticCache | PrefixKV = ElasticCache(kv_keep=keep, semantics="reference")
    if path.name.startswith("prefixkv"):
        fractions = tuple(1 - arrays["evicted_fraction_per_layer"])
        rows = (ProfileRow(keep, fractions),)
        recipe = PrefixKV(kv_keep=keep, rows=rows, semantics="reference")
    rule = recipe.cache_rule()
    return meta, arrays, rule, Budgets.of(rule.compression, meta["layers"], None)


def prefill(arrays: dict[str, np.ndarray], layer: int, rule: CacheRule, kept: int) -> Sample:
    key, value = (torch.from_numpy(arrays[f"{x}_{layer}"]) for x in "kv")
    importance = torch.from_numpy(arrays[f"attn_{layer}"]).mean(1).sum(1)
    length = torch.tensor([key.shape[2]])
    attributes = {"mode": rule.mode, "sinks": rule.compression.sinks, "recent": 1}
    inputs = (key, value, importance, length, torch.tensor([kept]), torch.arange(kept))
    return Sample("", inputs, attributes)


def test_all_six_are_there() -> None:
    assert len(VECTORS) == 6


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
def test_prefill_value_for_value(path: Path) -> None:
    meta, arrays, rule, budgets = load(path)
    n = arrays["k_0"].shape[2]
    kept = budgets.prompt(np.full((meta["layers"], 1), n))[:, 0]
    for layer, count in enumerate(kept):
        sample = prefill(arrays, layer, rule, int(count))
        key, value, _, reported = CACHE_COMPACT(*sample.inputs, **sample.attributes)
        ours = session(single_node_model(CACHE_COMPACT, sample)).run(
            None, feeds(CACHE_COMPACT, sample)
        )
        for which, torch_one, ort_one in (("k", key, ours[0]), ("v", value, ours[1])):
            expected = arrays[f"prefill_{which}_{layer}"]
            assert torch_one.shape == expected.shape
            np.testing.assert_allclose(torch_one.numpy(), expected, atol=1e-6)
            np.testing.assert_allclose(ort_one, expected, atol=1e-6)
        assert reported.tolist() == [count]


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
def test_every_step_and_the_final_cache(path: Path) -> None:
    """The runtime's cache, which never moves an entry, in order of age."""
    meta, arrays, _, budgets = load(path)
    layers, kv_heads, width = meta["layers"], meta["kv_heads"], meta["head_dim"]
    n, steps = arrays["k_0"].shape[2], meta["steps"]
    seen = np.full((layers, 1), n)
    kept = budgets.prompt(seen)
    text = Text(layers, meta["heads"], kv_heads, width, width, 10, ())
    capacities = budgets.capacity(seen, np.array([steps])).tolist()
    cache = CompactCache(HostMemory(), text, "float32", 1, capacities, budgets)
    ages = [list(range(count)) for count in kept[:, 0]]  # age of the entry in each slot
    for layer in range(layers):
        for which, short in (("key", "k"), ("value", "v")):
            prompt = arrays[f"prefill_{short}_{layer}"]
            cache.buffers[f"{which}_{layer}"][:, :, : prompt.shape[2]] = prompt
    cache.begin(seen, kept)
    for step in range(steps):
        index, _ = cache.next_slot()
        for layer in range(layers):
            slot = int(index[layer, 0])
            for which, short in (("key", "k"), ("value", "v")):
                new = arrays[f"step{step}_{short}_{layer}"]
                cache.buffers[f"{which}_{layer}"][:, :, slot] = new[:, :, 0]
            ages[layer][slot : slot + 1] = [n + step]
        cache.advance(np.array([True]))
        lengths = (cache.lengths - (cache.victims >= 0))[:, 0]
        assert lengths.tolist() == arrays["step_lengths"][step].tolist(), step
    for layer in range(layers):
        victim = int(cache.victims[layer, 0])
        order = [int(s) for s in np.argsort(ages[layer]) if s != victim]
        for which, short in (("key", "k"), ("value", "v")):
            found = cache.buffers[f"{which}_{layer}"][:, :, order]
            np.testing.assert_allclose(found, arrays[f"final_{short}_{layer}"], atol=1e-6)
