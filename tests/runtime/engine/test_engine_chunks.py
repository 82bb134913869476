"""Prompts read in chunks, between the decode steps of what runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_tools import IMAGES, OTHERS, WAIT, ask, idle, intercept, running, same, submit, until
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import lvlm
from lvlm.core.errors import ParameterError
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.engine import Engine
from lvlm.runtime.engine.chunks import CHUNK_STEPS, FIRST, MIN_TOKENS, STEPS_BETWEEN, ChunkPace
from lvlm.runtime.engine.memory_plan import plan_memory
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.generate.loaded_graphs import TOKENS_AT_ONCE
from lvlm.runtime.model import Model

RAW: dict[str, Any] = {"chat_template": False}
ASKS = [
    ask("Read the top row.", (1,)),
    ask("How often does 7 appear?", (), max_new_tokens=20, ignore_eos=True),
    ask("<image> and <image> which is it, and why is it so?", (0, 1), **RAW),
    ask("<image> before <image>", (1, 0), logprobs=2, **RAW),
    ask("Hi", (), temperature=0.7, seed=3),
]


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with lvlm.load(folder) as model:
        yield model


@pytest.fixture(scope="module")
def answered(model: Model) -> list[Generation]:
    return [a.alone(model) for a in ASKS]


@settings(max_examples=examples(15))
@given(
    st.one_of(st.integers(1, 40), st.integers(1, TOKENS_AT_ONCE)),
    st.permutations(range(len(ASKS))),
    st.integers(1, 3),
    st.booleans(),
)
def test_answers_are_those_without_chunks(
    model: Model,
    answered: list[Generation],
    chunk: int,
    order: list[int],
    slots: int,
    together: bool,
) -> None:
    """Whatever the chunks' length, the order in which prompts come, and what runs beside them."""
    with Engine(model.folder, slots=slots, chunk_tokens=chunk) as engine:
        handles = []
        for which in order:
            handles.append((which, submit(engine, ASKS[which])))
            if not together:
                until(lambda: bool(handles[-1][1].token_ids) or handles[-1][1].done)
        for which, handle in handles:
            same(handle.result(WAIT), answered[which])
        idle(engine)


def order_of_calls(
    engine: Engine, read: str = "extend", go: threading.Event | None = None
) -> list[str]:
    """Names of the graphs, as they are run from now on; each run waits for ``go`` first."""
    calls: list[str] = []

    def called(name: str) -> None:
        assert go is None or go.wait(WAIT)
        calls.append(name)

    for name in ("vision", read, "decode"):
        graph = intercept(engine, name)
        graph.before = lambda inputs, outputs, name=name: called(name)  # type: ignore[misc] # noqa: ARG005
    return calls


def test_those_that_run_have_their_steps_between_two_chunks(
    folder: Path, answered: list[Generation]
) -> None:
    with Engine(folder, slots=2, chunk_tokens=16) as engine:
        calls = order_of_calls(engine)
        beside = running(engine)
        began = len(calls)
        same(submit(engine, ASKS[0]).result(WAIT), answered[0])
        beside.cancel()
    chunks = -(-answered[0].stats.prompt_tokens // 16)
    assert calls.count("extend") - calls[:began].count("extend") == chunks > 5
    first = calls.index("extend", began)
    read = calls[first : len(calls) - calls[::-1].index("extend")]
    assert read == (["extend"] + ["decode"] * STEPS_BETWEEN) * (chunks - 1) + ["extend"]


@pytest.fixture
def all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it took to read."""
    monkeypatch.setattr(ChunkPace, "steps_after", lambda *_, **__: STEPS_BETWEEN)


@pytest.mark.usefixtures("all_steps")
def test_and_between_two_images(folder: Path, answered: list[Generation]) -> None:
    with Engine(folder, slots=2, image_cache=0) as engine:
        calls = order_of_calls(engine)
        beside = running(engine)
        began = len(calls)
        same(submit(engine, ASKS[2]).result(WAIT), answered[2])
        beside.cancel()
    seen = calls[calls.index("vision", began) :]
    steps = ["decode"] * STEPS_BETWEEN
    assert seen[: 3 + 2 * STEPS_BETWEEN] == ["vision", *steps, "vision", *steps, "extend"]


@pytest.mark.usefixtures("all_steps")
def test_and_between_whole_prompts(folder: Path, answered: list[Generation]) -> None:
    with Engine(folder, slots=4, chunk_tokens=0, image_cache=0, reuse_prefixes=False) as engine:
        go = threading.Event()
        go.set()
        calls = order_of_calls(engine, "prefill", go)
        beside = running(engine)
        go.clear()  # until all of them wait to be read
        began = len(calls)
        handles = [submit(engine, ASKS[which]) for which in (1, 2, 4)]
        go.set()
        for handle, which in zip(handles, (1, 2, 4), strict=True):
            same(handle.result(WAIT), answered[which])
        beside.cancel()
    steps = ["decode"] * STEPS_BETWEEN
    seen = calls[calls.index("prefill", began) :]
    order = ["prefill", *steps, "vision", *steps, "vision", *steps, "prefill", *steps, "prefill"]
    assert seen[: len(order)] == order


def test_alone_a_prompt_is_read_at_once(engine: Engine, answered: list[Generation]) -> None:
    calls = order_of_calls(engine)
    same(submit(engine, ASKS[2]).result(WAIT), answered[2])
    assert calls.count("extend") == 1
    assert "prefill" not in engine._scheduler.batch.graphs.sessions


def test_an_engine_without_chunks(whole: Engine, answered: list[Generation]) -> None:
    extend, prefill = intercept(whole, "extend"), intercept(whole, "prefill")
    same(submit(whole, ASKS[0]).result(WAIT), answered[0])
    assert (extend.calls, prefill.calls) == (0, 1)


def test_others_are_answered_as_ever_beside_a_long_prompt(
    folder: Path, expected: list[Generation], model: Model
) -> None:
    long = ask("<image>" + "and so on " * 150 + "<image> what?", (0, 1), **RAW)
    with Engine(folder, slots=3) as engine:
        handles = [submit(engine, a) for a in OTHERS]
        same(submit(engine, long).result(WAIT), long.alone(model))
        for handle, one in zip(handles, expected, strict=True):
            same(handle.result(WAIT), one)


# Their length


def test_a_chunk_takes_as_long_as_some_steps() -> None:
    pace = ChunkPace(None)
    assert pace.tokens(beside=False) == TOKENS_AT_ONCE
    assert pace.tokens(beside=True) == FIRST
    for _ in range(40):
        pace.stepped(0.02)
        pace.read(pace.tokens(beside=True), 0.002 * pace.tokens(beside=True))
    assert pace.tokens(beside=True) == pytest.approx(CHUNK_STEPS * 0.02 / 0.002, abs=1)
    for _ in range(40):  # the past has become longer
        pace.read(50, 0.004 * 50)
    assert pace.tokens(beside=True) == pytest.approx(CHUNK_STEPS * 0.02 / 0.004, abs=1)
    for _ in range(40):
        pace.read(MIN_TOKENS - 1, 99.0)  # so few say nothing of a token
        pace.stepped(1e-9)
    assert pace.tokens(beside=True) == MIN_TOKENS
    for _ in range(40):
        pace.stepped(60.0)
    assert pace.tokens(beside=True) == TOKENS_AT_ONCE
    assert [ChunkPace(7).tokens(beside=b) for b in (True, False)] == [7, 7]


def test_steps_are_owed_by_the_time_of_what_was_read() -> None:
    pace = ChunkPace(None)
    assert pace.steps_after(1.0) == STEPS_BETWEEN  # nothing was measured
    pace.stepped(0.02)
    chunk = CHUNK_STEPS * 0.02
    owed = [pace.steps_after(part * chunk) for part in (0.01, 0.3, 0.4, 0.6, 0.75, 0.99, 9.0)]
    assert owed == [1, 1, 2, 2, 3, 3, 3]
    fixed = ChunkPace(16)  # every chunk: who says its length wants no gap to be longer
    fixed.stepped(0.02)
    assert fixed.steps_after(0.01) == STEPS_BETWEEN


@pytest.mark.parametrize("wrong", [-1, TOKENS_AT_ONCE + 1, 1.5, "all", True])
def test_lengths_that_cannot_be(wrong: Any, folder: Path) -> None:
    with pytest.raises(ParameterError, match="chunk_tokens is"):
        Engine(folder, chunk_tokens=wrong)


def test_what_is_read_at_once_bounds_the_workspace(folder: Path) -> None:
    manifest = read_bundle(folder)
    whole, large, small = (
        plan_memory(manifest, manifest.capacity, 1, None, 0, chunk).workspace
        for chunk in (None, TOKENS_AT_ONCE, 32)
    )
    assert whole > 2 * large > 4 * small
    with Engine(folder, slots=1, chunk_tokens=32) as engine:
        assert engine.memory().workspace == small
        assert engine.generate("Hi", IMAGES[:1], max_new_tokens=1).token_ids


def test_images_that_are_read_at_once_bound_the_workspace(folder: Path) -> None:
    """Whatever the chunk; read as a whole, a layer under a mask holds a prompt's logits."""
    manifest = read_bundle(folder)
    both = replace(manifest, images=replace(manifest.images, bidirectional=True))
    (whole, small), (own, image) = (
        [plan_memory(m, m.capacity, 1, None, 0, chunk).workspace for chunk in chunks]
        for m, chunks in ((both, (None, 32)), (manifest, (None, manifest.images.tokens)))
    )
    tokens = manifest.capacity.max_text_len
    tokens += manifest.capacity.max_images * manifest.images.tokens
    assert whole - own == 4 * manifest.text.heads * tokens**2
    assert small == image
