"""Profiles: what a bundle's calls ever ask for lies in them, and they contradict nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from example_counts import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from settings import CACHED

from lvlm.core.errors import CapacityError, ParameterError
from lvlm.plugins_trt.engines.engine_request import parse_architectures, parse_size
from lvlm.plugins_trt.engines.shape_profiles import (
    EngineLimits,
    longest_prompt,
    parse_batch,
    profiles,
    shapes,
)
from lvlm.runtime.bundle.engine_sets import Range
from lvlm.runtime.bundle.manifest import Manifest, Port
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.kv.answer_limits import new_token_limit
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.image_tokens import keep_ratios, plan_prefill

RECIPES = ("none", "lightvlm (cached)", "prefixkv (cached)", "lightvlm with prefixkv")
ROWS = 3


@pytest.fixture(scope="module")
def manifests(bundle: Callable[..., Path]) -> dict[str, Manifest]:
    return {
        name: read_bundle(bundle("digits-llava", *CACHED.get(name, (name,)), max_images=2))
        for name in RECIPES
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("max_prompt", [None, 145, 200])
def test_ranges_are_in_order_and_usual_lengths_are_those_of_one_call(
    recipe: str, max_prompt: int | None, manifests: dict[str, Manifest]
) -> None:
    manifest = manifests[recipe]
    found = profiles(manifest, EngineLimits(Range(1, 2, 4), max_prompt))
    assert set(found) == set(manifest.graphs)
    for name, profile in found.items():
        for extent in profile.values():
            assert 1 <= extent.min <= extent.opt <= extent.max
        extents = shapes(manifest.graphs[name], profile, manifest.capacity.per_layer)
        assert set(extents) == {port.name for port in manifest.graphs[name].inputs}
    prefill = found["prefill"]
    assert prefill["sequence"].max == (max_prompt or longest_prompt(manifest))
    for dim, extent in prefill.items():
        if dim.startswith(("length_", "entries_")):
            # No layer has more entries than there are tokens: else the builder refuses.
            assert extent.opt <= prefill["sequence"].opt
            assert extent.max <= prefill["sequence"].max
    assert found["vision"]["units"].max == 4  # the runtime encodes no more at once
    tokens = manifest.images.tokens
    assert prefill["rows"].max == 4 * manifest.capacity.max_images * tokens


def test_units_of_images_that_are_one_whole_or_many_tiles(
    manifests: dict[str, Manifest],
) -> None:
    """At their own resolution one image is encoded at a time, tiles are a few at a time."""
    manifest = manifests["none"]
    ports = Port("pixel_values", "float32", ("units", 4, 12)), Port("window", "int64", ("windows",))
    graphs = {**manifest.graphs, "vision": replace(manifest.graphs["vision"], inputs=ports)}
    images = replace(manifest.images, independent_units=False, max_dims={"units": 30, "windows": 8})
    whole = profiles(replace(manifest, images=images, graphs=graphs), EngineLimits(Range(1, 2, 4)))
    assert whole["vision"] == {"units": Range(1, 30, 30), "windows": Range(1, 8, 8)}
    for units, most in ((1, 2), (5, 4)):
        tiled = replace(manifest, images=replace(manifest.images, max_dims={"units": units}))
        assert profiles(tiled, EngineLimits(Range(1, 1, 1)))["vision"]["units"].max == most


def test_an_image_that_is_read_at_once_has_room(manifests: dict[str, Manifest]) -> None:
    for bidirectional, most in ((False, 512), (True, 700)):
        images = replace(manifests["none"].images, tokens=700, bidirectional=bidirectional)
        found = profiles(replace(manifests["none"], images=images), EngineLimits(Range(1, 1, 1)))
        assert found["extend"]["tokens"].max == most


@settings(
    max_examples=examples(60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_call_that_fits_the_bundle_fits_the_profile(
    recipe: str, data: st.DataObject, manifests: dict[str, Manifest]
) -> None:
    manifest = manifests[recipe]
    capacity, tokens, layers = manifest.capacity, manifest.images.tokens, manifest.text.layers
    rows = data.draw(st.integers(1, ROWS))
    length = st.integers(1, capacity.max_text_len - 1)
    text = data.draw(st.lists(length, min_size=rows, max_size=rows))
    count = st.integers(0, capacity.max_images)
    images = data.draw(st.lists(count, min_size=rows, max_size=rows))
    keep = data.draw(st.none() | st.floats(0.01, 1)) if manifest.reductions else None
    kv_keep = data.draw(st.none() | st.floats(0.01, 1)) if manifest.cache_policy else None
    plan = plan_prefill(
        manifest.reductions,
        keep_ratios(manifest.reductions, manifest.keep, keep),
        layers,
        text,
        [[tokens] * n for n in images],
        [min(5, t) for t in text],
    )
    budgets = Budgets.of(manifest.cache_policy, layers, kv_keep)
    try:
        for row in range(rows):
            new_token_limit(
                manifest.capacity, budgets, plan.entries[:, row], text[row], images[row], 1
            )
    except CapacityError:
        return  # refused before any engine is asked
    given = dict(plan.inputs)
    given["input_ids"] = np.zeros((rows, int(plan.entries[0].max())), np.int64)
    given["image_features"] = np.zeros((max(1, sum(images) * tokens), 1))
    for layer, most in enumerate(budgets.prompt(plan.entries).max(1)):
        given[f"kv_slots_{layer}"] = np.arange(most)
    profile = profiles(manifest, EngineLimits(Range(1, 1, ROWS)))["prefill"]
    for port in manifest.graphs["prefill"].inputs:
        for dim, extent in zip(port.dims, getattr(given.get(port.name), "shape", ()), strict=False):
            if isinstance(dim, str):
                assert profile[dim].min <= extent <= profile[dim].max, (port.name, dim)


@pytest.mark.parametrize(
    ("max_prompt", "why"),
    [
        (10_000, r"room for 2335 tokens \(--max-text-len 2048, --max-images 2\); give less"),
        (144, "one image and a word take 145 tokens; give more"),
    ],
)
def test_prompts_that_cannot_be(max_prompt: int, why: str, manifests: dict[str, Manifest]) -> None:
    with pytest.raises(ParameterError, match=why):
        profiles(manifests["none"], EngineLimits(Range(1, 1, 1), max_prompt))


def test_words_of_the_command_line() -> None:
    assert parse_batch("4") == Range(4, 4, 4)
    assert parse_batch("1..8") == Range(1, 1, 8)
    assert parse_batch("1..4..8") == Range(1, 4, 8)
    for text in ("", "0", "8..1", "1..2..3..4", "x", "1..x", "-1"):
        with pytest.raises(ParameterError, match="--batch"):
            parse_batch(text)
    assert parse_size("4GB") == 4 * 10**9
    assert parse_size("1.5 MiB") == 3 * 2**19
    assert parse_size("512KB") == 512_000
    assert parse_size("1000") == 1000
    for text in ("", "0", "4 apples", "-1GB", "GB"):
        with pytest.raises(ParameterError, match="--workspace"):
            parse_size(text)
    assert parse_architectures("8.9, sm_86,89") == (86, 89)
    for text in ("", "ampere", "86;89"):
        with pytest.raises(ParameterError, match="--sm"):
            parse_architectures(text)
