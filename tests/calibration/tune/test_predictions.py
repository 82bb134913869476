"""What is predicted before an export is what the bundle then says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from settings import AT_ENCODER, CACHED

from lvlm.calibration.tune.predictions import Load, imagined, predict
from lvlm.export.recipes.recipe import known_recipe, parse_settings
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.bundle.reader import read_bundle

LOAD = Load(text_tokens=40, images=2, new_tokens=60, concurrency=3)
CACHE = "1MB"


@pytest.fixture(scope="module")
def full(bundle: Callable[..., Path]) -> Manifest:
    return read_bundle(bundle("digits-llava", max_images=2))


@pytest.mark.parametrize("name", ["lightvlm (cached)", "hybrid"])
def test_imagined_bundles_are_as_real_ones(
    name: str, full: Manifest, bundle: Callable[..., Path]
) -> None:
    recipe, *settings = (CACHED | AT_ENCODER)[name]
    real = read_bundle(bundle("digits-llava", recipe, *settings, max_images=2))
    guess = imagined(full, parse_settings(known_recipe(recipe), settings), LOAD)
    # How wide a tower's scores are only its graph tells
    if real.encoder is not None:
        real = replace(real, encoder=replace(real.encoder, scores=0))
    assert guess.shortenings == real.shortenings
    assert guess.cache_policy == real.cache_policy
    assert guess.keep == real.keep
    found = predict(full, guess, LOAD, CACHE)
    assert found == predict(full, real, LOAD, CACHE)
    assert found.prefill < 1 or not real.shortenings
    assert found.decode < 1


def test_lower_fractions_are_less_of_everything(full: Manifest) -> None:
    recipe = parse_settings(known_recipe("divprune"), ["kv=snapkv", "kv.window=8"])
    guess = imagined(full, recipe, LOAD)
    before = predict(full, full, LOAD, CACHE)
    assert (before.prefill, before.decode) == (1, 1)
    for keep, kv_keep in ((0.35, 0.5), (0.2, 0.5), (0.2, 0.1)):
        found = predict(full, guess, LOAD, CACHE, keep, kv_keep)
        assert found.memory < before.memory
        assert found.prefill <= before.prefill
        assert found.decode < before.decode
        before = found


def test_each_request_at_a_time_takes_its_cache(full: Manifest) -> None:
    sizes = [predict(full, full, Load(40, 1, 60, count), CACHE).memory for count in (1, 2, 3)]
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] > 0
