"""The memory that a plan promises is what the runtime takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bundles import CACHED

from lvlm.plugins_trt.engine_listing import cache_bytes
from lvlm.runtime.budgets import Budgets
from lvlm.runtime.model import load


@pytest.mark.parametrize("recipe", ["none", "prefixkv (cached)", "lightvlm (cached)"])
def test_the_cache_of_one_prompt(recipe: str, bundle: Callable[..., Path]) -> None:
    with load(bundle("tiny-llava", *CACHED.get(recipe, (recipe,)), max_images=2)) as model:
        manifest = model.manifest
        budgets = Budgets.of(manifest.compression, manifest.text.layers, None)
        cache = model.batches.cache_for(1, np.array(manifest.capacity.per_layer), budgets)
        assert cache_bytes(manifest) == sum(buffer.nbytes for buffer in cache.buffers.values())
