"""Bundles whose cache is held in 8 bits, against torch and against plain arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from example_counts import whole
from parity_tools import ROWS, canonical, make_reference
from settings import CACHED

import lvlm
from lvlm.runtime.backends.ort.kernels.kernel_library import KERNELS
from lvlm.runtime.engine import Engine
from lvlm.runtime.options.generation_options import GenerationOptions

STEPS = 40  # more than an interval of compaction
# A ring of queries; entries that leave one by one; sums of attention; all of it merged
RECIPES = {
    "none": ("none",),
    **{n: CACHED[f"{n} (cached)"] for n in ("lightvlm", "elastic-cache", "h2o", "snapkv")},
}
FORMS = ("canonical", "lowered", "kernels")
# In a normal run two forms, on two recipes; canonical graphs with --whole
USUAL = [("none", "kernels"), ("lightvlm", "lowered")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recipe" in metafunc.fixturenames:
        every = list(itertools.product(RECIPES, FORMS))
        whole = metafunc.config.getoption("--whole")
        metafunc.parametrize(("recipe", "form"), every if whole else USUAL)


def export(bundle: Callable[..., Path], recipe: str) -> Path:
    return bundle("digits-llava", *RECIPES[recipe], max_images=2, cache="int8")


def test_logits_are_those_of_torch_with_a_rounded_cache(
    recipe: str,
    form: str,
    checkpoint: Callable[[str], Path],
    bundle: Callable[..., Path],
    kernels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the same tokens, at half of the cache where a recipe shortens it."""
    folder = export(bundle, recipe)
    if form == "canonical":
        folder = canonical(folder, tmp_path / "canonical")
    monkeypatch.setenv(KERNELS, str(kernels) if form == "kernels" else "off")
    kv_keep = None if recipe == "none" else 0.5
    reference = make_reference(checkpoint("digits-llava"), *RECIPES[recipe])
    reference.cache_dtype = torch.int8
    options = GenerationOptions(chat_template=False, max_new_tokens=STEPS)
    with lvlm.load(folder) as model:
        prompts = [model.prepare(0, *row, options) for row in ROWS]
        answers = [
            reference.generate(
                prompt, reference.encode(prompt.images), max_new_tokens=STEPS, kv_keep=kv_keep
            )
            for prompt in prompts
        ]
        batch = model.calls.start(prompts, None, kv_keep)
        for step in range(STEPS):
            wanted = np.stack([answer.logits[step].numpy() for answer in answers])
            # A number of the cache may be rounded the other way
            assert np.abs(batch.logits - wanted).max() < 1e-2 * np.abs(wanted).max(), step
            second, best = np.sort(wanted, axis=1)[:, -2:].T
            decided = best - second > 2e-2 * np.abs(wanted).max()
            tokens = np.array([answer.tokens[step] for answer in answers])
            assert (batch.logits.argmax(1) == tokens)[decided].all(), step
            if step + 1 < STEPS:
                batch.feed([answer.tokens[step] for answer in answers])
    assert len({tuple(answer.tokens) for answer in answers}) == len(ROWS)


def test_entries_are_those_of_a_full_cache_rounded_by_hand(bundle: Callable[..., Path]) -> None:
    options = GenerationOptions(chat_template=False, max_new_tokens=4)
    caches = []
    for folder in (bundle("digits-llava", max_images=2), export(bundle, "none")):
        with lvlm.load(folder) as model:
            prompts = [model.prepare(0, *row, options) for row in ROWS]
            batch = model.calls.start(prompts, None, None)
            caches.append({n: np.array(b) for n, b in batch.cache.buffers.items()})
    full, held = caches
    for name, entries in held.items():
        for row, prompt in enumerate(prompts):
            last = len(prompt.ids) - 1
            for entry, wanted in zip(entries[row, :, last], full[name][row, :, last], strict=True):
                step = 2 ** (int(entry[-1]) / 8)
                assert max(map(abs, wanted)) <= 127.5 * step
                # The step below would not have held it
                assert max(map(abs, wanted)) > 127.4 * step * 2 ** (-1 / 8)
                for number, x in zip(entry[:-1], wanted, strict=True):
                    assert math.isclose(number * step, x, rel_tol=0, abs_tol=0.501 * step)


def test_a_conversation_goes_on_over_a_cache_in_8_bits(bundle: Callable[..., Path]) -> None:
    """The second turn reads what the first one left, and answers as one that reads all anew."""
    folder = export(bundle, "none")
    asked = {"max_new_tokens": 12, "temperature": 0.0}
    with Engine(folder, slots=1) as engine:
        texts, images = ROWS[0]
        first = engine.submit(texts, images, chat_template=False, **asked).result(60)
        again = engine.submit(texts, images, chat_template=False, **asked).result(60)
        assert first.token_ids == again.token_ids
        assert again.stats.reused_tokens > 0


def test_bytes_are_a_quarter_and_a_scale_each(bundle: Callable[..., Path]) -> None:
    text, images = ROWS[0]
    used = []
    for folder in (bundle("digits-llava", max_images=2), export(bundle, "none")):
        with lvlm.load(folder) as model:
            width = model.manifest.text.head_dim
            stats = model.generate(text, images, max_new_tokens=2, chat_template=False).stats
            used.append((stats.cache_bytes_allocated, stats.cache_bytes_used))
    for full, held in zip(*used, strict=True):
        assert held * 4 * width == full * (width + 1)


@pytest.mark.parametrize("name", ["lfm2-vl:gqa-conv-first", "qwen3.5:gqa-linear-first"])
def test_states_lie_beside_in_types_of_their_own(name: str, bundle: Callable[..., Path]) -> None:
    """Inputs of convolutions in fp16, matrices in fp32; answers go on over both."""
    if name.startswith("qwen") and not whole():
        pytest.skip("another export: --whole")
    with lvlm.load(bundle(name, max_images=2, cache="int8")) as model:
        types = {
            n: b.dtype
            for n, b in model.calls.start(
                [
                    model.prepare(
                        0, "a b c", [], GenerationOptions(chat_template=False, max_new_tokens=2)
                    )
                ],
                None,
                None,
            ).cache.buffers.items()
        }
        assert types["key_0"] == np.int8
        assert types["state_0"] == np.float16
        assert types.get("state_1", np.float32) == np.float32
        answer = model.generate("a b c", max_new_tokens=6, chat_template=False, ignore_eos=True)
        assert len(answer.token_ids) == 6
