"""Bundles against transformers' generate and against the torch reference, token for token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import EXPORTED, LIGHT, TINY, moves, their_answer, transformers_inputs
from example_counts import whole
from parity_tools import IMAGES, ROWS, load_torch, make_reference
from settings import ASSETS, LIGHTVLM

import lvlm
from lvlm.export.ops.token_merge.contract import OP as TOKEN_MERGE
from lvlm.export.recipes.parts import pyramid
from lvlm.export.reference.torch_reference import Reference
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions

MODELS = ["digits-llava", *EXPORTED]
KEEPS = [0.35, 0.15, 0.03, 1.0]


def transformers_tokens(
    folder: Path,
    model: Model,
    count: int,
    rows: Sequence[tuple[str, list[np.ndarray]]] = ROWS,
) -> list[list[int]]:
    """Greedy ids of transformers' own generate, prompt by prompt, without its processor."""
    theirs = load_torch(folder)
    answers = []
    for text, images in rows:
        prompt = model.prepare(0, text, images, GenerationOptions(chat_template=False))
        given = transformers_inputs(folder, prompt)
        answers.append(their_answer(theirs, prompt.ids, given, max_new_tokens=count))
    return answers


@pytest.mark.parametrize("name", MODELS)
def test_none_equals_transformers_generate(
    name: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    with lvlm.load(bundle(name, max_images=2)) as model:
        count = 64 if whole() else 32
        expected = transformers_tokens(checkpoint(name), model, count)
        texts, images = [r[0] for r in ROWS], [r[1] for r in ROWS]
        options: dict[str, Any] = {"max_new_tokens": count, "chat_template": False}
        alone = [
            model.generate(text, images, **options).token_ids
            for text, images in zip(texts, images, strict=True)
        ]
        together = [g.token_ids for g in model.generate(texts, images, **options)]
    assert alone == expected
    assert together == expected
    # The prompts matter, though random weights may end in the same loop
    assert len({tuple(ids) for ids in expected}) >= len(ROWS) - 1


def reference_answers(
    reference: Reference, model: Model, keep: float, count: int, rows: Sequence[int]
) -> list[Any]:
    answers: list[Any] = []
    for text, images in (ROWS[row] for row in rows):
        prompt = model.prepare(0, text, images, GenerationOptions(chat_template=False))
        features = reference.encode(prompt.images)
        entered: list[torch.Tensor] = []

        def merge(*inputs: Any, entered: Any = entered, **attributes: Any) -> Any:
            entered.append(inputs[0][0].clone())
            return TOKEN_MERGE(*inputs, **attributes)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pyramid, "TOKEN_MERGE", merge)
            answer: Any = reference.generate(
                prompt,
                features,
                max_new_tokens=count,
                keep=keep,
                eos_ids=model.manifest.text.eos_ids,
            )
        answer.entered = entered
        answers.append(answer)
    return answers


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"name", "settings"} <= set(metafunc.fixturenames):
        every = ["digits-llava", *filter(moves, TINY)]
        names = every if metafunc.config.getoption("--whole") else LIGHT
        cases: list[tuple[str, tuple[str, ...]]] = [(name, ()) for name in names]
        cases.append(("digits-llava", ("merge=nearest", "importance=last")))
        cases.append(("digits-llava", ("merge=drop", "stages=[2,4]")))
        of = ("qwen2.5-vl:gqa", "digits-llava")[: 1 + metafunc.config.getoption("--whole")]
        cases += [(name, ("merge=illava",)) for name in of]
        metafunc.parametrize(("name", "settings"), cases)


def test_lightvlm_equals_its_torch_reference(
    name: str,
    settings: tuple[str, ...],
    asked: Sequence[Sequence[int]],
    checkpoint: Callable[[str], Path],
    bundle: Callable[..., Path],
) -> None:
    """One bundle, every keep ratio; in a batch of prompts of different lengths."""
    texts, images = [r[0] for r in ROWS], [r[1] for r in ROWS]
    with lvlm.load(bundle(name, *LIGHTVLM, *settings, max_images=2)) as model:
        reference = make_reference(checkpoint(name), *LIGHTVLM, *settings)
        for keep, some in zip(KEEPS, asked, strict=True):
            expected = reference_answers(reference, model, keep, 24, some)
            got = model.generate(texts, images, max_new_tokens=24, keep=keep, chat_template=False)
            for ours, theirs in zip((got[row] for row in some), expected, strict=True):
                assert ours.token_ids == theirs.tokens
                assert list(ours.stats.tokens_per_layer) == theirs.entries
                same_merges(ours.merge_maps, theirs)


def same_merges(maps: list[np.ndarray], theirs: Any) -> None:
    """Equal maps, but where two centres are equally similar up to rounding a token may go to
    either; what that changes then carries on to the later stages."""
    for mine, full, entered in zip(maps, theirs.maps, theirs.entered, strict=True):
        differ = np.flatnonzero(mine[: len(full)] != full.numpy())
        unit = torch.nn.functional.normalize(entered, dim=1)
        for token in differ:
            ours, other = (
                [int(i) for i in np.flatnonzero(full.numpy() == new) if i != token]
                for new in (mine[token], full[token].item())
            )
            gaps = (unit[ours] @ unit[token])[:, None] - (unit[other] @ unit[token])[None]
            assert gaps.abs().min() < 2e-6
        if len(differ):
            return


def test_keep_1_equals_recipe_none(bundle: Callable[..., Path]) -> None:
    texts, images = [r[0] for r in ROWS], [r[1] for r in ROWS]
    options: dict[str, Any] = {"max_new_tokens": 64, "chat_template": False}
    with lvlm.load(bundle("digits-llava", max_images=2)) as model:
        none = [g.token_ids for g in model.generate(texts, images, **options)]
        batch = model.calls.start(
            [model.prepare(0, *ROWS[1], GenerationOptions(chat_template=False))]
        )
        logits = batch.logits.copy()
    with lvlm.load(bundle("digits-llava", *LIGHTVLM, max_images=2)) as model:
        options |= {"keep": 1.0, "kv_keep": 1.0}
        merged = [g.token_ids for g in model.generate(texts, images, **options)]
        batch = model.calls.start(
            [model.prepare(0, *ROWS[1], GenerationOptions(chat_template=False))],
            keep=1.0,
            kv_keep=1.0,
        )
        # A layer that is asked for importance has its attention in another form.
        np.testing.assert_allclose(batch.logits, logits, atol=1e-4)
    assert merged == none


def test_image_tokens_entering_each_layer_follow_the_schedule(
    bundle: Callable[..., Path],
) -> None:
    """V * keep ** (i / n), rounded, after stage i of n; seen in what the caches really hold."""
    with lvlm.load(bundle("digits-llava", *LIGHTVLM, max_images=2)) as model:
        for keep in (0.35, 0.15, 0.03):
            batch = model.calls.start(
                [model.prepare(0, "Describe the picture.", IMAGES[:1], GenerationOptions())],
                keep,
                1.0,
            )
            text = int(batch.running[0].counts.prefill.entries[0, 0]) - 144
            steps = [144, *(max(1, round(144 * keep ** (i / 3))) for i in (1, 2, 3))]
            expected = [steps[min(layer, 3)] for layer in range(6)]
            written = [
                int((np.abs(batch.cache.buffers[f"key_{layer}"][0]).max((0, 2)) > 0).sum())
                for layer in range(6)
            ]
            assert [n - text for n in written] == expected


def test_an_image_anywhere(bundle: Callable[..., Path]) -> None:
    """First, last, between words and alone: recipe none as transformers; lightvlm at keep 1 as
    none, and at less alone as in a batch."""
    texts = ["First words <image> then words", "Describe this: <image>", "<image>Say", "<image>"]
    rows = [(text, IMAGES[:1]) for text in texts]
    options: dict[str, Any] = {"max_new_tokens": 16, "chat_template": False}
    with lvlm.load(bundle("digits-llava", max_images=2)) as model:
        plain = [model.generate(*row, **options).token_ids for row in rows]
        assert plain == transformers_tokens(ASSETS / "digits-llava", model, 16, rows)
    with lvlm.load(bundle("digits-llava", *LIGHTVLM, max_images=2)) as model:
        for row, tokens in zip(rows, plain, strict=True):
            assert model.generate(*row, keep=1.0, kv_keep=1.0, **options).token_ids == tokens
            alone = model.generate(*row, keep=0.2, **options)
            pair = model.generate([row[0], "Hello"], [row[1], []], keep=0.2, **options)
            assert pair[0].token_ids == alone.token_ids


def test_padding_and_company_change_nothing(bundle: Callable[..., Path]) -> None:
    """Logits of a row alone and beside a longer row with more images."""
    with lvlm.load(bundle("digits-llava", *LIGHTVLM, max_images=2)) as model:
        rows = [model.prepare(0, *row, GenerationOptions(chat_template=False)) for row in ROWS]
        together = model.calls.start(rows).logits.copy()
        for row, prompt in enumerate(rows):
            alone = model.calls.start([prompt]).logits
            np.testing.assert_allclose(together[row], alone[0], atol=2e-4)
