"""Sessions: a conversation keeps its cache, whatever the recipe, and its turns are read as decode
would read them; where that cannot be, they are read as a whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_tools import IMAGES, LONG, WAIT, Held, answers, ask, idle, intercept, same, scheduler
from settings import CACHED

import lvlm
from lvlm.core.errors import BackendError, ParameterError, RequestCancelled
from lvlm.runtime.engine import Engine, Session
from lvlm.runtime.engine.aio import AsyncEngine
from lvlm.runtime.generate import tokens_behind
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.generate.asks import one_ask
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.prompts import Prompt

# In a normal run: compaction at intervals behind merging, one by one, of the prompt alone, and by
# sums that go on
USUAL = ["lightvlm (cached)", "elastic-cache (cached)", "snapkv (cached)", "h2o (cached)"]
QUESTIONS = ["And how often does 7 appear, and where?", "Which digit is in the top row?", "Why?"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 9}  # past its end an answer is no text
RATIO = {"kv_keep": 0.3}
Messages = list[dict[str, Any]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "folder" in metafunc.fixturenames:
        names = CACHED if metafunc.config.getoption("--whole") else USUAL
        if "_read_" not in metafunc.function.__name__:  # what is the engine's, not the recipe's
            names = ["elastic-cache (cached)"]
        metafunc.parametrize("folder", list(names), indirect=True, scope="module")


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, bundle: Callable[..., Path]) -> Path:
    return bundle("digits-llava", *CACHED[request.param], max_images=2, sessions=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with lvlm.load(folder) as model:
        yield model


def user(text: str, image: Path | None = None) -> dict[str, Any]:
    shown = [] if image is None else [{"type": "image", "image": str(image)}]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def assistant(answer: Generation) -> dict[str, Any]:
    return {"role": "assistant", "content": answer.text}


def ask_turn(engine: Engine, talk: Messages, session: Session | None, **options: Any) -> Generation:
    return engine.generate(talk, session=session, **(OPTIONS | RATIO | options))


def converse(engine: Engine, session: Session | None, *turns: dict[str, Any]) -> list[Generation]:
    """The answers to the messages of a conversation, each of which is a turn."""
    talk: Messages = []
    found: list[Generation] = []
    for message in turns:
        talk.append(message)
        found.append(ask_turn(engine, talk, session))
        talk.append(assistant(found[-1]))
    return found


def prompt_of(model: Model, talk: Messages, **options: Any) -> Prompt:
    asked = one_ask(talk)
    return model.prepare(0, asked.prompt, asked.images, GenerationOptions(**options))


def test_turns_are_read_as_decode_reads_them(model: Model) -> None:
    """Nothing but decode's own steps, by hand, whatever the lengths of the answers."""
    with Engine(model.folder, slots=2) as engine, engine.session() as session:
        talk = [user("Describe the picture.", IMAGES[0])]
        batch = model.calls.start([prompt_of(model, talk, max_new_tokens=250)], **RATIO)
        held = list(prompt_of(model, talk).ids)
        for number, question in enumerate([*QUESTIONS, ""]):
            options = {"max_new_tokens": 9 + 8 * number}
            ours = ask_turn(engine, talk, session, **options)
            tokens = []
            prompt = prompt_of(model, talk)
            assert list(prompt.ids[: len(held)]) == held  # or else the test shows nothing
            if number:
                for token in prompt.ids[len(held) :]:
                    batch.feed([token])
                assert ours.stats.reused_tokens == len(held)
                left = batch.cache.entries[:, 0]
                assert ours.stats.kept_per_layer == tuple(left.tolist())
                assert ours.stats.tokens_per_layer == tuple(batch.cache.seen[:, 0].tolist())
            while len(tokens) < len(ours.token_ids):
                tokens.append(int(batch.logits[0].argmax()))
                if len(tokens) < len(ours.token_ids):
                    batch.feed(tokens[-1:])
            assert ours.token_ids == tokens
            assert ours.stats.cache_bytes_used == batch.cache.bytes_used(0)
            held = [*prompt.ids, *tokens[:-1]]
            talk += [assistant(ours), user(question)]
        idle(engine)
    model.calls.forget()


def test_turns_are_read_in_pieces_of_any_length_images_too(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image comes in as a whole, in whatever pieces it is read."""
    turns = [user("What is it?", IMAGES[0]), user("And this?", IMAGES[1]), user(QUESTIONS[1])]
    found = []
    for most in (512, 7):
        monkeypatch.setattr(tokens_behind, "TOKENS_AT_ONCE", most)
        with Engine(model.folder, slots=1) as engine, engine.session() as session:
            found.append(converse(engine, session, *turns))
            vision = scheduler(engine).images
            assert (vision.hits, vision.misses) == (0, 2)  # none is encoded for a second turn
    for ours, theirs in zip(*found, strict=True):
        same(ours, theirs)
    assert all(answer.stats.reused_tokens for answer in found[0][1:])
    tokens = model.manifest.images.tokens
    assert found[0][1].stats.prompt_tokens - found[0][1].stats.reused_tokens > tokens


def test_what_makes_a_turn_be_taken_as_a_whole(model: Model) -> None:
    first, second = user("Describe the picture.", IMAGES[0]), user(QUESTIONS[0])
    with Engine(model.folder, slots=1) as engine, engine.session() as session:
        one, _ = converse(engine, session, first, second)
        talk = [first, assistant(one), second]

        def whole(*changed: dict[str, Any], **options: Any) -> None:
            asked = list(changed) or talk
            ours = ask_turn(engine, asked, session, **options)
            assert ours.stats.reused_tokens == 0
            same(ours, model.generate(asked, **(OPTIONS | RATIO | options)))

        def goes_on() -> None:
            ours = ask_turn(engine, [first], session)
            assert ours.stats.reused_tokens == 0
            assert ask_turn(engine, [first, assistant(ours), second], session).stats.reused_tokens

        whole()  # not the conversation so far, but one turn less
        whole(user("Describe the picture.", IMAGES[1]), assistant(one), second)  # another image
        goes_on()
        ask_turn(engine, [first], session)
        whole(kv_keep=0.8)
        ask_turn(engine, [first], session)
        ask_turn(engine, [user("Hi")], None)  # needs the only row
        whole()
        goes_on()


def test_a_turn_without_room_is_read_as_a_whole(bundle: Callable[..., Path]) -> None:
    """A later turn's image is not merged, so there is room for two only from the beginning."""
    recipe, *settings = CACHED["lightvlm (cached)"]
    folder = bundle("digits-llava", recipe, *settings, max_images=2, sessions=True)
    with (
        Engine(folder, slots=1, max_text_len=80) as engine,
        engine.session() as session,
        lvlm.load(folder) as model,
    ):
        first, second = user("What is it?", IMAGES[0]), user("And this?", IMAGES[1])
        one = ask_turn(engine, [first], session, kv_keep=1.0)
        talk = [first, assistant(one), second]
        ours = ask_turn(engine, talk, session, kv_keep=1.0)
        assert ours.stats.reused_tokens == 0
        same(ours, model.generate(talk, **(OPTIONS | {"kv_keep": 1.0})))


def test_two_conversations_and_others_beside_them(model: Model) -> None:
    """Rows move while others come and go; each conversation answers as if it were alone."""
    turns = [user("What is it?", IMAGES[0]), user(QUESTIONS[0]), user(QUESTIONS[1])]
    others = [ask(max_new_tokens=25, ignore_eos=True), ask("Read it.", (1,), max_new_tokens=12)]
    expected = [one.alone(model) for one in others]
    with Engine(model.folder, slots=1) as engine, engine.session() as session:
        alone = converse(engine, session, *turns)
    with Engine(model.folder, slots=6) as engine, engine.session() as a, engine.session() as b:
        talks: list[Messages] = [[], []]
        for message, theirs in zip(turns, alone, strict=True):
            with answers(engine, others, expected):
                for talk in talks:
                    talk.append(message)
                handles = [
                    engine.submit(talk, session=one, **(OPTIONS | RATIO))
                    for talk, one in zip(talks, (a, b), strict=True)
                ]
                for talk, handle in zip(talks, handles, strict=True):
                    same(handle.result(WAIT), theirs)
                    talk.append(assistant(theirs))
        assert engine.stats().reused_tokens
        idle(engine)


@pytest.mark.parametrize("slots", [1, 2])
def test_a_turn_that_fails_or_is_cancelled_spoils_nothing(model: Model, slots: int) -> None:
    """With a second row the turn before is still there; with one the next is read as a whole."""
    turns = [user("Describe the picture.", IMAGES[0]), user(QUESTIONS[0])]
    with Engine(model.folder, slots=slots) as engine, engine.session() as session:
        held = Held(engine, "decode")
        held.go.set()
        expected = converse(engine, session, *turns)
        (one,) = converse(engine, session, turns[0])
        talk = [turns[0], assistant(one), turns[1]]
        extend = intercept(engine, "extend")

        def fail(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
            outputs["logits"][:] = np.nan
            raise BackendError("broken")

        extend.after = fail
        with pytest.raises(BackendError, match="broken"):
            ask_turn(engine, talk, session)
        extend.after = extend.before
        ours = ask_turn(engine, talk, session)
        if slots == 1:
            assert ours.stats.reused_tokens == 0
            same(ours, model.generate(talk, **(OPTIONS | RATIO)))
        else:
            same(ours, expected[1])
            assert ours.stats.reused_tokens == expected[1].stats.reused_tokens > 0
        held.reached.clear()
        held.go.clear()
        handle = engine.submit(
            [*talk, assistant(ours), user("Why?")], session=session, **(LONG | RATIO)
        )
        next(handle.tokens())
        assert held.reached.wait(WAIT)
        assert handle.cancel()
        held.go.set()
        with pytest.raises(RequestCancelled):
            handle.result()
        same(converse(engine, session, *turns)[1], expected[1])
        idle(engine)


def test_mistakes(model: Model) -> None:
    talk = [user("Hi")]
    with Engine(model.folder, slots=2) as engine, Engine(model.folder, slots=1) as another:
        session = engine.session()
        with pytest.raises(ParameterError, match="of another engine"):
            another.generate(talk, session=session)
        with pytest.raises(ParameterError, match="n is 2, but a conversation"):
            engine.generate(talk, session=session, n=2)
        with pytest.raises(ParameterError, match="session goes with one prompt"):
            engine.generate([talk], session=session)  # type: ignore[call-overload]
        with engine.submit(talk, session=session, **LONG) as handle:
            next(handle.tokens())
            with pytest.raises(ParameterError, match="last turn is not answered yet"):
                engine.submit(talk, session=session)
        assert ask_turn(engine, talk, session).text
        assert any(kept.waits for kept in scheduler(engine).batch.slots.kept.values())
        session.close()
        assert not any(kept.waits for kept in scheduler(engine).batch.slots.kept.values())
        with pytest.raises(ParameterError, match="session is closed"):
            engine.submit(talk, session=session)


def test_asyncio(model: Model) -> None:
    turns = [user("What is it?", IMAGES[0]), user(QUESTIONS[0])]
    with Engine(model.folder, slots=1) as engine, engine.session() as session:
        expected = converse(engine, session, *turns)

    async def talked() -> None:
        async with AsyncEngine(Engine(model.folder, slots=1)) as engine:
            session = engine.session()
            talk: Messages = []
            for message, theirs in zip(turns, expected, strict=True):
                talk.append(message)
                ours = await engine.generate(talk, session=session, **(OPTIONS | RATIO))
                same(ours, theirs)
                assert ours.stats.reused_tokens == theirs.stats.reused_tokens
                talk.append(assistant(ours))

    asyncio.run(talked())


def test_bundles_without_the_graph_say_how_to_get_it(bundle: Callable[..., Path]) -> None:
    recipe, *settings = CACHED["elastic-cache (cached)"]
    with (
        Engine(bundle("digits-llava", recipe, *settings, max_images=2), slots=1) as engine,
        pytest.raises(ParameterError, match="again with lvlm-export --sessions, or"),
    ):
        engine.session()


def test_with_recipe_none_a_session_keeps_its_row(bundle: Callable[..., Path]) -> None:
    """Without prefixes for others, too; an answer is that of the whole conversation."""
    turns = [user("What is it?", IMAGES[0]), user(QUESTIONS[0])]
    folder = bundle("digits-llava", max_images=2)
    with Engine(folder, slots=2, reuse_prefixes=False) as engine:
        talk: Messages = []
        for message in turns:
            talk.append(message)
            alone = engine.generate(talk, **OPTIONS)
            assert alone.stats.reused_tokens == 0
            talk.append(assistant(alone))
        with engine.session() as session:
            found = []
            talk = []
            for message in turns:
                talk.append(message)
                found.append(engine.generate(talk, session=session, **OPTIONS))
                talk.append(assistant(found[-1]))
        same(found[1], alone)
        assert found[1].stats.reused_tokens
