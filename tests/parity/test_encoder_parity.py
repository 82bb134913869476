"""Bundles that drop image tokens at the encoder's output against the torch reference, token for
token; what an image leaves serves other questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import MERGED, OTHERS
from parity_tools import IMAGES, ROWS, make_reference

import lvlm
from lvlm.core.errors import ParameterError
from lvlm.runtime.engine import Engine
from lvlm.runtime.options.generation_options import GenerationOptions

OPTIONS: dict[str, Any] = {"max_new_tokens": 16, "chat_template": False}
KEEPS = (0.5, 0.11)
RECIPES = ("divprune", "random", "strided", "hybrid")  # for all families
SCORED = ("llava-next:mistral-gqa", "visionzip")
# Tiles with text between them; rows of an image's own size, three positions each, DeepStack
USUAL = [
    ("digits-llava", "divprune"),
    ("smolvlm:gqa-tiles", "strided"),
    SCORED,
    ("qwen3-vl:gqa", "random"),
    ("qwen2-vl:gqa", "hybrid"),
]
FIRST = "USER: <image>\nDescribe the picture. ASSISTANT:"
SECOND = "USER: <image>\nWhich digit is in the top row? ASSISTANT:"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recipe" in metafunc.fixturenames:
        every = [(name, recipe) for name in dict.fromkeys([*MERGED, *OTHERS]) for recipe in RECIPES]
        every = [(name, recipe) for name, recipe in every if recipe != "hybrid" or name in MERGED]
        whole = metafunc.config.getoption("--whole")
        metafunc.parametrize(("name", "recipe"), [*every, SCORED] if whole else USUAL)


def test_bundles_equal_their_torch_reference(
    name: str, recipe: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    texts, images = [r[0] for r in ROWS], [r[1] for r in ROWS]
    reference = make_reference(checkpoint(name), recipe)
    with lvlm.load(bundle(name, recipe, max_images=2)) as model:
        for keep in KEEPS:
            found = model.generate(texts, images, keep=keep, **OPTIONS)
            for answer, text, own in zip(found, texts, images, strict=True):
                prompt = model.prepare(0, text, own, GenerationOptions(chat_template=False))
                tokens = sum(image.tokens for image in prompt.images)
                prompt = reference.read_at(prompt, keep)
                theirs = reference.generate(
                    prompt,
                    reference.encode(prompt.images),
                    max_new_tokens=16,
                    keep=keep,
                    eos_ids=model.manifest.text.eos_ids,
                )
                assert answer.token_ids == theirs.tokens
                assert list(answer.stats.tokens_per_layer) == theirs.entries
                ratio = keep**0.5 if recipe == "hybrid" else keep
                assert answer.stats.image_tokens == pytest.approx(tokens * ratio, abs=1.01)
        all_of_them = model.generate(texts, images, keep=1.0, **OPTIONS)
    with lvlm.load(bundle(name, max_images=2)) as model:
        none = model.generate(texts, images, **OPTIONS)
    assert [a.token_ids for a in all_of_them] == [a.token_ids for a in none]


def test_an_image_is_read_once_for_many_questions(
    bundle: Callable[..., Path],
) -> None:
    folder = bundle("digits-llava", "divprune", max_images=2)
    with lvlm.load(folder) as model, Engine(folder, slots=3) as engine:

        def ask(text: str, **options: Any) -> Any:
            ours = engine.generate(text, IMAGES[:1], **options, **OPTIONS)
            theirs = model.generate(text, IMAGES[:1], **options, **OPTIONS)
            assert ours.token_ids == theirs.token_ids
            assert ours.stats.kept_per_layer == theirs.stats.kept_per_layer
            return ours.stats

        first = ask(FIRST)
        assert first.reused_tokens == 0
        stays = first.image_tokens
        assert stays == 50  # of 144
        assert engine.images.bytes == stays * model.manifest.feature_width * 4
        assert ask(SECOND).reused_tokens > stays
        hits = engine.images.hits
        assert ask(SECOND, keep=0.5).reused_tokens < stays  # others stay
        assert engine.images.hits == hits
        assert ask(FIRST, keep=0.5).reused_tokens > 72


def test_long_prompts_are_read_in_chunks(bundle: Callable[..., Path]) -> None:
    """Positions of an image's tokens are known before the first piece."""
    folder = bundle("digits-llava", "divprune", max_images=2)
    prompt = ROWS[3]
    with lvlm.load(folder) as model:
        expected = model.generate(*prompt, **OPTIONS).token_ids
    with Engine(folder, slots=2, chunk_tokens=16) as engine:
        beside = engine.submit(ROWS[0][0], ROWS[0][1], max_new_tokens=60, ignore_eos=True)
        assert engine.generate(*prompt, **OPTIONS).token_ids == expected
        beside.cancel()


def test_an_image_of_one_token(bundle: Callable[..., Path]) -> None:
    with lvlm.load(bundle("digits-llava", "strided", max_images=2)) as model:
        answer = model.generate(FIRST, [np.zeros((9, 9, 3), np.uint8)], keep=1e-6, **OPTIONS)
    assert answer.stats.image_tokens == 1


def test_a_turn_that_is_read_behind_a_compressed_cache(bundle: Callable[..., Path]) -> None:
    """Its image loses tokens, too, which have their own positions: with room for every entry it is
    answered as the whole conversation is."""
    settings = ("divprune", "kv=elastic-cache", "kv_keep=1.0")
    folder = bundle("digits-llava", *settings, max_images=2, sessions=True)
    talk: list[dict[str, Any]] = []
    with lvlm.load(folder) as model, Engine(folder, slots=2) as engine, engine.session() as session:
        for text, image in (("Read the top row.", IMAGES[0]), ("And here?", IMAGES[1])):
            shown = {"type": "image", "image": image}
            talk.append({"role": "user", "content": [shown, {"type": "text", "text": text}]})
            asked: dict[str, Any] = {"max_new_tokens": 9, "logprobs": 0}
            ours, theirs = (
                engine.generate(talk, session=session, **asked),
                model.generate(talk, **asked),
            )
            assert ours.token_ids == theirs.token_ids
            found = [score.logprob for score in ours.scores]
            assert found == pytest.approx([score.logprob for score in theirs.scores], abs=1e-3)
            talk.append({"role": "assistant", "content": ours.text})
    assert 50 < ours.stats.reused_tokens < ours.stats.prompt_tokens - 50  # the second image is read


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("qwen2-vl:gqa", ("visionzip",), "is not read out of qwen2-vl's; take divprune"),
        ("smolvlm:gqa-tiles", ("hybrid", "encoder=visionzip"), "is not read out of smolvlm's"),
        ("qwen2-vl:gqa", ("divprune", "places=closed"), "have three positions each"),
        ("internvl:qwen2-gqa", ("evs",), "shortens videos, and this model takes none"),
    ],
)
def test_what_a_family_cannot_do_is_said_before_any_work(
    name: str, settings: tuple[str, ...], said: str, bundle: Callable[..., Path]
) -> None:
    with pytest.raises(ParameterError, match=said):
        bundle(name, *settings)
