"""Messages in the place of a prompt: every call takes them, alone and in lists, and counts them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from model_tools import IMAGE, OTHER, QUESTION
from settings import LIGHTVLM

from lvlm.core.errors import CapacityError, ParameterError, PromptError
from lvlm.runtime.engine import Engine
from lvlm.runtime.engine.aio import AsyncEngine
from lvlm.runtime.generate.token_count import TokenCount
from lvlm.runtime.model import Model

FIRST: dict[str, Any] = {
    "role": "user",
    "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": QUESTION}],
}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    FIRST,
    {"role": "assistant", "content": "A grid."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "And "}, {"type": "image", "image": OTHER}],
    },
]
SHORT: dict[str, Any] = {"max_new_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(bundle: Callable[..., Path]) -> Iterator[Engine]:
    with Engine(bundle("digits-llava", *LIGHTVLM, max_images=2), threads=1, slots=2) as engine:
        yield engine


def test_one_message_is_a_question(light: Model) -> None:
    asked = light.generate(QUESTION, [IMAGE], system="Be brief.", **SHORT)
    assert light.generate(TALK[:2], **SHORT).token_ids == asked.token_ids
    assert light.generate([FIRST], system="Be brief.", **SHORT).token_ids == asked.token_ids


def test_every_call_takes_messages(light: Model, engine: Engine) -> None:
    answer = light.generate(TALK, **SHORT)
    assert answer.image_id.max() == 2
    with light.stream(TALK, **SHORT) as stream:
        assert "".join(stream) == answer.text
    scored = light.score(TALK, answer.token_ids)
    assert scored.token_ids == answer.token_ids
    assert engine.submit(TALK, **SHORT).result().token_ids == answer.token_ids
    assert engine.generate(TALK, **SHORT).token_ids == answer.token_ids
    assert "".join(engine.stream(TALK, **SHORT)) == answer.text

    async def ask() -> None:
        asynchronous = AsyncEngine(engine)
        assert (await asynchronous.generate(TALK, **SHORT)).token_ids == answer.token_ids
        assert (await (await asynchronous.submit(TALK, **SHORT))).token_ids == answer.token_ids
        assert "".join([piece async for piece in asynchronous.stream(TALK, **SHORT)]) == answer.text
        assert await asynchronous.count_tokens(TALK) == engine.count_tokens(TALK)

    asyncio.run(ask())


def test_a_list_of_conversations_and_questions(light: Model, engine: Engine) -> None:
    alone = [light.generate(TALK, **SHORT), light.generate(QUESTION, [OTHER], **SHORT)]
    for model in (light, engine):
        both = model.generate([TALK, QUESTION], [None, [OTHER]], **SHORT)
        assert [one.token_ids for one in both] == [one.token_ids for one in alone]
    forced = [one.token_ids for one in alone]
    scored = light.score([TALK, QUESTION], forced, [None, [OTHER]])
    assert [one.token_ids for one in scored] == forced


def test_tokens_are_counted_before_running(light: Model, engine: Engine) -> None:
    for options in ({}, {"keep": 0.3, "kv_keep": 0.5}):
        stats = light.generate(TALK, **SHORT, **options).stats
        counted = light.count_tokens(TALK, **options)
        assert isinstance(counted, TokenCount)
        assert counted.prompt_tokens == stats.prompt_tokens
        assert counted.image_tokens == stats.image_tokens
        assert counted.kept_per_layer == stats.kept_per_layer
        assert engine.count_tokens(TALK, **options) == counted
    limit = light.manifest.capacity.max_text_len
    counts = light.count_tokens([TALK, "Hi"], max_new_tokens=1)
    assert [type(one) for one in counts] == [TokenCount, TokenCount]
    assert counts[1].new_tokens == limit - counts[1].prompt_tokens
    assert light.count_tokens(QUESTION, [IMAGE]) == light.count_tokens([FIRST])
    with pytest.raises(CapacityError, match="--max-images 2; give fewer"):
        light.count_tokens([TALK[1], TALK[2], TALK[3], TALK[2], TALK[1]])


def test_an_engines_slots_bound_what_is_counted(bundle: Callable[..., Path]) -> None:
    folder = bundle("digits-llava", *LIGHTVLM, max_images=2)
    with Engine(folder, threads=1, slots=1, max_text_len=64, max_images=1) as engine:
        counted = engine.count_tokens([FIRST])
        assert counted.prompt_tokens - counted.image_tokens + counted.new_tokens == 64
        filled = engine.generate([FIRST], max_new_tokens=64, ignore_eos=True)
        assert len(filled.token_ids) == counted.new_tokens
        assert filled.capacity_reached
        with pytest.raises(CapacityError, match="--max-images 1"):
            engine.count_tokens(TALK)


def test_mistakes(light: Model, engine: Engine) -> None:
    for model in (light, engine):
        with pytest.raises(ParameterError, match="system is given twice"):
            model.generate(TALK, system="Be long.")
        with pytest.raises(PromptError, match="messages need a chat template"):
            model.generate(TALK, chat_template=False)
        with pytest.raises(PromptError, match="the prompt is empty"):
            model.generate([{"role": "user", "content": [{"type": "text", "text": " \n"}]}])
        with pytest.raises(PromptError, match="images beside messages"):
            model.generate(TALK, [IMAGE])
        with pytest.raises(PromptError, match="no place for images in messages of some role"):
            model.generate([FIRST, {"role": "assistant", "content": FIRST["content"]}])
        with pytest.raises(PromptError, match="prompt is \\['Hi'\\]; give the question"):
            model.stream(["Hi"])  # type: ignore[arg-type]
