"""The memory that plans promise is what a cache takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from settings import CACHED

from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.cache import cache_bytes
from lvlm.runtime.model import load


@pytest.mark.parametrize("recipe", ["prefixkv (cached)", "lightvlm (cached)", "h2o (cached)"])
def test_the_cache_of_one_prompt(recipe: str, bundle: Callable[..., Path]) -> None:
    with load(bundle("digits-llava", *CACHED[recipe], max_images=2)) as model:
        manifest = model.manifest
        budgets = Budgets.of(manifest.cache_policy, manifest.text.layers, None)
        cache = model.calls.cache_for(1, np.array(manifest.capacity.per_layer), budgets)
        taken = sum(buffer.nbytes for buffer in cache.buffers.values())
        assert cache_bytes(manifest, 1, manifest.capacity.per_layer) == taken
