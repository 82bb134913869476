"""The bytes of a cache that a dry run says are those that a runtime allocates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from settings import CACHED

from lvlm.core.discovery import discover
from lvlm.export.bundle_manifest import manifest_of
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.recipes.recipe import parse_settings
from lvlm.runtime.kv.cache import cache_bytes

NONE = ("none",)


@pytest.mark.parametrize("cache", [None, "fp16", "int8"])
@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("digits-llava", NONE),
        ("digits-llava", CACHED["lightvlm (cached)"]),  # a ring of queries
        ("digits-llava", CACHED["h2o (cached)"]),  # sums of attention
        ("lfm2-vl:gqa-conv-first", NONE),  # states
    ],
    ids=lambda given: given if isinstance(given, str) else given[0],
)
def test_a_plan_counts_what_a_cache_takes(
    model: str, recipe: tuple[str, ...], cache: str | None, checkpoint: Callable[[str], Path]
) -> None:
    parsed = parse_settings(discover("lvlm.export.recipes", "RECIPE")[recipe[0]], recipe[1:])
    source = str(checkpoint(model))
    plan = make_plan(ExportOptions(source, parsed, Path("out"), dtype="fp32", cache=cache))
    manifest = manifest_of(plan, {}, {}, {})
    assert plan.cache.bytes == cache_bytes(manifest, 1, manifest.capacity.per_layer)
