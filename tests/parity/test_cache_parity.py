"""Bundles with cache compression against the torch reference, token for token.

The reference holds plain lists and deletes from them; the runtime overwrites slots in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CACHED_USUAL, TINY
from settings import CACHED
from test_parity import ROWS, make_reference

import lvlm
from lvlm.export.reference.torch_reference import Reference
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.policies.shares import Profile
from lvlm.runtime.prompt.prompts import Prompt

KEEPS = (0.1, 0.2, 0.5, 0.9)
LONG = 256
WHOLE = [
    *(("tiny-llava", cached) for cached in CACHED),
    *((model, cached) for model in TINY for cached in CACHED if "(cached)" in cached),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"name", "cached"} <= set(metafunc.fixturenames):
        whole = metafunc.config.getoption("--whole")
        metafunc.parametrize(("name", "cached"), WHOLE if whole else CACHED_USUAL)


@pytest.fixture
def count(request: pytest.FixtureRequest) -> int:
    """Tokens to compare."""
    return LONG if request.config.getoption("--whole") else 64


def prompts(model: Model, count: int) -> list[Prompt]:
    options = GenerationOptions(chat_template=False, max_new_tokens=count)
    return [model.prepare(0, text, images, options) for text, images in ROWS]


def greedy(
    model: Model, rows: Sequence[Prompt], count: int, **ratios: Any
) -> tuple[list[list[int]], list[np.ndarray], Any]:
    """Tokens [row][step] past any end of text, each step's logits [B,vocabulary], the batch."""
    batch = model.calls.start(rows, **ratios)
    logits = [batch.logits.copy()]
    while len(logits) < count:
        batch.feed(batch.logits.argmax(1).tolist())
        logits.append(batch.logits.copy())
    return np.argmax(logits, 2).T.tolist(), logits, batch


def expected(reference: Reference, prompt: Prompt, count: int, kv_keep: float) -> Any:
    features = reference.encode(prompt.images)
    return reference.generate(prompt, features, max_new_tokens=count, kv_keep=kv_keep)


def with_profile_of(model: Model, reference: Reference) -> Reference:
    """The reference with the profile that the export measured, if it did."""
    cache_policy = model.manifest.cache_policy
    assert cache_policy is not None
    budget = cache_policy.budget
    if isinstance(budget, Profile):
        reference.recipe = reference.recipe.with_profile(budget.keep, budget.rows)
    return reference


def test_bundle_equals_its_torch_reference(
    name: str,
    cached: str,
    count: int,
    checkpoint: Callable[[str], Path],
    bundle: Callable[..., Path],
) -> None:
    """One bundle, every fraction; each prompt alone and in a batch of different lengths."""
    recipe, *settings = CACHED[cached]
    with lvlm.load(bundle(name, recipe, *settings, max_images=2)) as model:
        reference = make_reference(checkpoint(name), recipe, *settings)
        reference = with_profile_of(model, reference)
        rows = prompts(model, count)
        shrunk = set()
        for kv_keep in KEEPS:
            answers = [expected(reference, row, count, kv_keep) for row in rows]
            together, _, batch = greedy(model, rows, count, kv_keep=kv_keep)
            assert together == [a.tokens for a in answers], kv_keep
            assert batch.running[0].counts.kept.T.tolist() == [a.kept for a in answers]
            alone, _, _ = greedy(model, rows[1:2], count, kv_keep=kv_keep)
            assert alone == [answers[1].tokens], kv_keep
            shrunk.add(int(batch.cache.lengths.sum()))
        assert len(shrunk) == len(KEEPS)  # the fraction matters


@pytest.mark.parametrize("cached", [c for c in CACHED if c != "lightvlm with prefixkv"])
def test_keep_1_is_none(cached: str, bundle: Callable[..., Path]) -> None:
    """Prefill and 256 tokens, in a batch of different lengths. Decode may use another attention
    (docs/cpu.md), so that logits agree up to rounding."""
    with lvlm.load(bundle("tiny-llava", max_images=2)) as model:
        tokens, full, _ = greedy(model, prompts(model, LONG), LONG)
    recipe, *settings = CACHED[cached]
    with lvlm.load(bundle("tiny-llava", recipe, *settings, max_images=2)) as model:
        ratios = {"keep": 1.0} if recipe == "lightvlm" else {}
        mine, logits, _ = greedy(model, prompts(model, LONG), LONG, kv_keep=1.0, **ratios)
    assert mine == tokens
    for ours, theirs in zip(logits, full, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
