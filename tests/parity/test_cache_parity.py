"""Bundles with cache compression against the torch reference, token for token.

The reference holds plain lists and deletes from them; the runtime overwrites slots in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import BESIDE_STATES, CACHED_USUAL, TINY, moves
from near_ties import NEAR, lead_of_what_stays
from parity_tools import ROWS, make_reference
from settings import CACHED

import lvlm
from lvlm.export.reference.torch_reference import Reference
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.policies.shares import Profile
from lvlm.runtime.prompt.prompts import Prompt

KEEPS = (0.1, 0.2, 0.5, 0.9)
LONG = 256
OTHERS = {
    "within a modality": (*CACHED["elastic-cache (cached)"], "within_modality=true"),
    "each head merges": (*CACHED["snapkv (cached)"], "select=merge"),
}
ALSO = [(model, other) for model in ("digits-llava", "qwen2-vl:gqa") for other in OTHERS]
WHOLE = [
    *(("digits-llava", cached) for cached in CACHED),
    *((name, cached) for name in filter(moves, TINY) for cached in CACHED if "(cached)" in cached),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"name", "cached"} <= set(metafunc.fixturenames):
        whole = metafunc.config.getoption("--whole")
        metafunc.parametrize(
            ("name", "cached"), (WHOLE if whole else CACHED_USUAL) + ALSO + BESIDE_STATES
        )


@pytest.fixture
def count(request: pytest.FixtureRequest) -> int:
    """Tokens to compare."""
    return LONG if request.config.getoption("--whole") else 24


@pytest.fixture(scope="module")
def uncompressed(bundle: Callable[..., Path]) -> tuple[list[list[int]], list[np.ndarray]]:
    """Tokens and logits of digits-llava's whole cache."""
    with lvlm.load(bundle("digits-llava", max_images=2)) as model:
        return greedy(model, prompts(model, LONG), LONG)[:2]


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


def with_profile_of(model: Model, reference: Reference) -> Reference:
    """The reference with the profile that the export measured, if it did."""
    cache_policy = model.manifest.cache_policy
    assert cache_policy is not None
    budget = cache_policy.budget
    if isinstance(budget, Profile):
        reference.recipe = reference.recipe.with_profile(budget.keep, budget.rows)
    return reference


def same_or_tied(
    ours: list[int], theirs: list[int], logits: list[np.ndarray], ask: Callable[..., Any]
) -> bool:
    """Whether two answers are one, or go apart only where rounding decides: between two tokens, of
    our ``logits`` [vocabulary] a step, or in a ranking of entries before; ``ask`` gives the
    reference's answer again."""
    if ours == theirs:
        return True
    first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    best, other = logits[first][[ours[first], theirs[first]]]
    if best - other < NEAR * np.abs(logits[first]).max():
        return True
    with lead_of_what_stays() as leads:
        ask(max_new_tokens=first + 1)
    return bool(leads) and min(leads) < NEAR


def test_bundle_equals_its_torch_reference(
    name: str,
    cached: str,
    count: int,
    asked: Sequence[Sequence[int]],
    checkpoint: Callable[[str], Path],
    bundle: Callable[..., Path],
) -> None:
    """One bundle, every fraction, of random weights two in a normal run; prompts alone and in a
    batch of different lengths."""
    recipe, *settings = (CACHED | OTHERS)[cached]
    with lvlm.load(bundle(name, recipe, *settings, max_images=2)) as model:
        reference = make_reference(checkpoint(name), recipe, *settings)
        reference = with_profile_of(model, reference)
        rows = prompts(model, count)
        features = [reference.encode(row.images) for row in rows]
        shrunk = set()
        pairs = list(zip(KEEPS, asked, strict=True))
        if count < LONG and name != "digits-llava":
            pairs = pairs[::2]
        for kv_keep, some in pairs:
            together, logits, batch = greedy(model, rows, count, kv_keep=kv_keep)
            kept = batch.running[0].counts.kept.T.tolist()
            for row in some:
                ask = partial(reference.generate, rows[row], features[row], kv_keep=kv_keep)
                answer = ask(max_new_tokens=count)
                own = [step[row] for step in logits]
                assert same_or_tied(together[row], answer.tokens, own, ask), (kv_keep, row)
                assert kept[row] == answer.kept, (kv_keep, row)
            alone, logits, _ = greedy(model, rows[row : row + 1], count, kv_keep=kv_keep)
            own = [step[0] for step in logits]
            assert same_or_tied(alone[0], answer.tokens, own, ask), (kv_keep, row)
            shrunk.add(int(batch.cache.lengths.sum()))
        assert len(shrunk) == len(pairs)  # the fraction matters


@pytest.mark.parametrize("cached", [c for c in CACHED if c != "lightvlm with prefixkv"])
def test_keep_1_is_none(
    cached: str,
    uncompressed: tuple[list[list[int]], list[np.ndarray]],
    bundle: Callable[..., Path],
) -> None:
    """Prefill and 256 tokens, in a batch of different lengths. Decode may use another attention
    (docs/cpu.md), so that logits agree up to rounding."""
    tokens, full = uncompressed
    recipe, *settings = (CACHED | OTHERS)[cached]
    with lvlm.load(bundle("digits-llava", recipe, *settings, max_images=2)) as model:
        ratios = {"keep": 1.0} if recipe == "lightvlm" else {}
        mine, logits, _ = greedy(model, prompts(model, LONG), LONG, kv_keep=1.0, **ratios)
    assert mine == tokens
    for ours, theirs in zip(logits, full, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
