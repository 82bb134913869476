"""semantics=reference against what the papers' released code did (tests/data/caches/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvlm.export.recipes.elastic_cache import ElasticCache
from lvlm.export.recipes.parts.cache_rule import CacheRule
from lvlm.export.recipes.prefixkv import PrefixKV
from lvlm.runtime.backends.host.buffers import HostMemory
from lvlm.runtime.bundle.manifest import Text
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.cache import CompactCache
from lvlm.runtime.policies.selections import Evict, ReleasedMerge
from lvlm.runtime.policies.shares import ProfileRow

VECTORS = sorted((Path(__file__).parents[2] / "data/caches").glob("*.npz"))


class Memory(HostMemory):
    name = "host"
    static_capacity = False

    def load(self, folder: Any, manifest: Any, name: str) -> Any: ...


def load(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], CacheRule, Budgets]:
    """meta, arrays, and the recipe's rule and budgets for the same setting."""
    arrays = dict(np.load(path))
    meta = json.loads(str(arrays.pop("meta")))
    keep = 1 - meta["evicted_fraction"]
    recipe: ElasticCache | PrefixKV = ElasticCache(kv_keep=keep, semantics="reference")
    if path.name.startswith("prefixkv"):
        fractions = tuple(1 - arrays["evicted_fraction_per_layer"])
        keep = float(np.mean(fractions))  # near what was asked for
        rows = (ProfileRow(keep, fractions),)
        recipe = PrefixKV(kv_keep=keep, rows=rows, semantics="reference")
    rule = recipe.cache_rule()
    assert rule is not None
    return meta, arrays, rule, Budgets.of(rule.cache_policy, meta["layers"], None)


def test_all_six_are_there() -> None:
    assert len(VECTORS) == 6


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
def test_prompts_keep_as_many(path: Path) -> None:
    """The values are in test_cache_compact_recorded.py."""
    meta, arrays, rule, budgets = load(path)
    kept = budgets.prompt(np.full((meta["layers"], 1), meta["prompt"]))[:, 0]
    assert kept.tolist() == [arrays[f"prefill_k_{i}"].shape[2] for i in range(meta["layers"])]
    kind = Evict if path.name.startswith("prefixkv") else ReleasedMerge
    assert isinstance(rule.cache_policy.select, kind)


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
    cache = CompactCache(Memory(), text, "float32", 1, capacities, budgets)
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
