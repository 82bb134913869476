"""What a prompt shares with another is not read again: the graph extend reads the rest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_tools import (
    IMAGES,
    OTHERS,
    WAIT,
    Ask,
    answers,
    ask,
    idle,
    intercept,
    same,
    scheduler,
    submit,
    until,
)
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import lvlm
from lvlm.core.errors import BackendError, RequestCancelled, RequestTimeout
from lvlm.runtime.engine import Engine
from lvlm.runtime.engine.prefixes import worthwhile
from lvlm.runtime.engine.reading import ReadingInPieces
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.media.prepared_image import ImageTokens
from lvlm.runtime.model import Model

RAW: dict[str, Any] = {"chat_template": False}
WORDS = ("top", "row", "digit", "seven", "and", "how", "often?", "<image>")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with lvlm.load(folder) as model:
        yield model


@pytest.fixture
def pieces(folder: Path) -> Iterator[Engine]:
    """An engine whose pieces are so short that every rest has several, between decode steps."""
    with Engine(folder, slots=3, chunk_tokens=4) as engine:
        yield engine
        idle(engine)


def test_a_conversation_with_images_in_two_turns(engine: Engine, model: Model) -> None:
    """Each turn reads what is new alone, its image too, and answers as if all were read."""
    extend, vision = intercept(engine, "extend"), intercept(engine, "vision")
    lengths: list[int] = []
    extend.before = lambda inputs, outputs: lengths.append(inputs["input_ids"].shape[1])  # noqa: ARG005
    text, images, held, encoded = "", list[Path](), 0, 0
    turns = [("<image>\nDescribe it.", 0), ("And the top row?", None), ("<image>\nThis?", 1)]
    for question, image in [*turns, ("Which is it?", None)]:
        text += f"USER: {question} ASSISTANT:"
        images += [] if image is None else [IMAGES[image]]
        options = RAW | {"max_new_tokens": 9, "ignore_eos": True}
        theirs = model.generate(text, images, **options)
        ours = engine.generate(text, images, **options)
        same(ours, theirs)
        # All but where the answer's end and the next question may be one token
        assert ours.stats.reused_tokens >= held - 3
        assert sum(lengths) == ours.stats.prompt_tokens - ours.stats.reused_tokens
        encoded += image is not None
        assert vision.calls == encoded
        held = ours.stats.prompt_tokens + ours.stats.new_tokens - 1
        lengths.clear()
        text += f" {ours.text}\n"  # the template has the space
    assert held > 2 * model.manifest.images.tokens


@settings(max_examples=examples(25))
@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=12),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=12),
    st.integers(0, 12),
    st.integers(1, 200),
)
def test_any_two_prompts(
    model: Model, one: list[str], other: list[str], shared: int, piece: int
) -> None:
    """Whatever they share, and in pieces of whatever length."""
    asks = []
    for words in (one, one[:shared] + other):
        words = ["what", *words]
        while words.count("<image>") > len(IMAGES):
            words.remove("<image>")
        asks.append(ask(" ".join(words), tuple(range(words.count("<image>"))), **RAW))
    with Engine(model.folder, slots=1, chunk_tokens=piece) as engine:
        for each in asks:
            same(engine.generate(*each.arguments, **each.options), each.alone(model))


def test_an_image_that_is_partly_read_is_encoded_and_others_before_it_are_not(
    model: Model,
) -> None:
    vision = intercept(model, "vision")
    question = ask("<image> and <image> what?", (0, 1), **RAW)
    prompt = model.prepare(0, *question.arguments, lvlm.GenerationOptions(**RAW))
    graphs = model.calls.graphs
    batch = model.calls.start([prompt])
    assert vision.calls == 1  # both at once
    expected = batch.logits.copy()
    (request,) = batch.running
    request.digests = []
    middle = int(np.flatnonzero(prompt.image_id == 2)[20])
    call = graphs.bind("extend", batch.cache.views(slice(0, 1)))
    encoded: list[int] = []

    def encode(images: Any, digests: Any) -> list[ImageTokens]:  # noqa: ARG001
        encoded.append(len(images))
        return graphs.tokens(images)

    rest = ReadingInPieces(request, slice(0, 1), graphs, encode, call, middle)
    np.testing.assert_allclose(rest.run(), expected, atol=1e-3)
    assert encoded == [1]
    model.calls.forget()


def test_when_it_pays(model: Model) -> None:
    prompt = model.prepare(0, "<image> what?", [IMAGES[0]], lvlm.GenerationOptions(**RAW))
    length = len(prompt.ids)
    assert worthwhile(prompt, -(-length // 8), extends=True)
    assert not worthwhile(prompt, length // 8 - 1, extends=True)
    assert worthwhile(prompt, length - 1, extends=False)
    assert not worthwhile(prompt, length // 2, extends=False)


# Faults, cancellation and timeouts in the middle

SECOND = ask("USER: <image>\nDescribe the picture. How many? Tell me all of it. ASSISTANT:", **RAW)
FIRST = ask("USER: <image>\nDescribe the picture. ASSISTANT:", **RAW)


@pytest.fixture
def answered(model: Model) -> tuple[Generation, Generation]:
    return FIRST.alone(model), SECOND.alone(model)


def get(engine: Engine, one: Ask) -> Generation:
    return engine.generate(*one.arguments, **one.options)


def test_a_piece_that_fails(
    pieces: Engine, expected: list[Generation], answered: tuple[Generation, Generation]
) -> None:
    engine = pieces
    extend = intercept(engine, "extend")
    starts: list[int] = []

    def fail(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
        starts.append(int(inputs["write_index"][0]))
        if len(starts) == 2:
            for name, buffer in scheduler(engine).batch.cache.buffers.items():
                if name.startswith("key"):
                    buffer[scheduler(engine).batch.slots.filling.start] = np.nan
            raise RuntimeError("out of luck")

    same(get(engine, FIRST), answered[0])
    with answers(engine, OTHERS, expected):
        until(lambda: not engine.stats().waiting and scheduler(engine)._prefilling is None)
        extend.before = fail
        with pytest.raises(BackendError, match="out of luck"):
            submit(engine, SECOND).result(WAIT)
        extend.before = lambda inputs, outputs: None  # noqa: ARG005
    idle(engine)
    assert all(np.isfinite(b).all() for b in scheduler(engine).batch.cache.buffers.values())
    again = get(engine, SECOND)
    same(again, answered[1])
    assert again.stats.reused_tokens > again.stats.image_tokens


@pytest.mark.parametrize("how", ["cancelled", "out of time"])
def test_it_ends_between_two_pieces(
    how: str,
    pieces: Engine,
    expected: list[Generation],
    answered: tuple[Generation, Generation],
) -> None:
    engine = pieces
    extend = intercept(engine, "extend")
    there, go_on = threading.Event(), threading.Event()
    late = how == "out of time"
    starts: list[int] = []

    def hold(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
        starts.append(int(inputs["write_index"][0]))
        if len(starts) == 2:
            there.set()
            assert go_on.wait(WAIT)

    same(get(engine, FIRST), answered[0])
    with answers(engine, OTHERS, expected):
        until(lambda: not engine.stats().waiting and scheduler(engine)._prefilling is None)
        extend.before = hold
        handle = submit(engine, SECOND)
        assert there.wait(WAIT)
        read = scheduler(engine)._prefilling
        assert read is not None
        if late:
            read.request.deadline = 0.0
        else:
            handle.cancel()
        go_on.set()
        with pytest.raises(RequestTimeout if late else RequestCancelled):
            handle.result(WAIT)
    idle(engine)
    assert len(starts) == 2  # what was left is not read
    extend.before = lambda inputs, outputs: None  # noqa: ARG005
    same(get(engine, SECOND), answered[1])
