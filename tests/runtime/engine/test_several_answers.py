"""Several answers to a prompt that is read once: each is the one that a lone call draws, and how a
group ends."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_tools import (
    IMAGES,
    LONG,
    OTHERS,
    QUESTION,
    WAIT,
    Held,
    answers,
    idle,
    intercept,
    same,
    scheduler,
    until,
)
from example_counts import whole
from fake_engines import Make
from settings import CACHED, LIGHTVLM

import lvlm
from lvlm.core.errors import (
    BackendError,
    EngineClosedError,
    ParameterError,
    RequestCancelled,
    RequestTimeout,
)
from lvlm.runtime.engine import Engine, Handle
from lvlm.runtime.engine.aio import AsyncEngine
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.generate.loaded_graphs import Graphs
from lvlm.runtime.run_cli import main

RECIPES = {"none": ("none",), "lightvlm": LIGHTVLM, **CACHED}
# In a normal run one of each way that entries leave; test_engine.py has every recipe
USUAL = ["none", "lightvlm", "lightvlm (cached)", "elastic-cache (cached)", "h2o (cached)"]
DRAWN: dict[str, Any] = {"temperature": 0.9, "max_new_tokens": 14, "ignore_eos": True}


@pytest.fixture
def slots() -> int:
    return 4


def all_of(answer: Generation) -> list[Generation]:
    return [answer, *answer.others]


@pytest.mark.parametrize("recipe", RECIPES if whole() else USUAL)
def test_four_answers_are_those_of_four_lone_calls(
    recipe: str, bundle: Callable[..., Path]
) -> None:
    """A list of prompts, too, whose rows are ragged: answer k of prompt r has seed + r * n + k."""
    folder = bundle("digits-llava", *RECIPES[recipe], max_images=2)
    options = DRAWN | ({"kv_keep": 0.5} if recipe in CACHED else {})
    asks = ["Read the top row.", "Hi"], [IMAGES[:2], []]
    with lvlm.load(folder) as model, Engine(folder, slots=5) as engine:
        expected = [
            model.generate(asks[0][row], asks[1][row], seed=7 + seed, **options)
            for row, seed in [*((0, k) for k in range(4)), *((1, k) for k in range(4, 8))]
        ]
        assert len({tuple(one.token_ids) for one in expected}) > 4
        for who in (model, engine):
            # An engine reads prompts of recipe none by the graph extend
            prefill = intercept(who, "extend" if (who, recipe) == (engine, "none") else "prefill")
            first = who.generate(asks[0][0], asks[1][0], n=4, seed=7, **options)
            assert prefill.calls == 1
            both = who.generate(*asks, n=4, seed=7, **options)
            found = [one for answer in both for one in all_of(answer)]
            assert [len(all_of(answer)) for answer in [first, *both]] == [4, 4, 4]
            for ours, theirs in zip([*all_of(first), *found], expected[:4] + expected, strict=True):
                same(replace(ours, others=()), theirs)
                assert ours.stats.cache_bytes_used == theirs.stats.cache_bytes_used
                for mine, other in zip(ours.merge_maps, theirs.merge_maps, strict=True):
                    np.testing.assert_array_equal(mine[: len(other)], other)
            assert all(one.others == () for answer in both for one in answer.others)
        idle(engine)


def test_what_runs_beside_them_is_as_if_alone(engine: Engine, expected: list[Generation]) -> None:
    with answers(engine, OTHERS, expected):
        four = engine.generate(QUESTION, IMAGES[:1], n=4, seed=1, **DRAWN)
    again = engine.generate(QUESTION, IMAGES[:1], n=2, seed=1, **DRAWN)
    for ours, theirs in zip(all_of(again), all_of(four)[:2], strict=True):
        same(replace(ours, others=()), replace(theirs, others=()))
    stats = engine.stats()
    assert (stats.submitted, stats.answered) == (8, 8)


def test_answers_of_their_own_lengths(engine: Engine, folder: Path) -> None:
    options: dict[str, Any] = {"temperature": 3.0, "seed": 0, "max_new_tokens": 60}
    with lvlm.load(folder) as model:
        together = model.generate(QUESTION, IMAGES[:1], n=4, **options)
    found = engine.generate(QUESTION, IMAGES[:1], n=4, **options)
    assert len({len(one.token_ids) for one in all_of(found)}) > 1
    same(found, together)


@pytest.mark.parametrize("extends", [True, False])
def test_a_prompt_that_begins_like_an_earlier_one(
    extends: bool, engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rest is read once; without the graph extend by decode, in every answer's row."""
    monkeypatch.setattr(Graphs, "extends", property(lambda _: extends))
    engine.generate(QUESTION, IMAGES[:1], max_new_tokens=2)
    found = engine.generate(QUESTION + " Now!", IMAGES[:1], n=3, seed=4, **DRAWN)
    assert found.stats.reused_tokens > found.stats.image_tokens
    assert (found.stats.prefill_ms > 0) == extends
    with lvlm.load(folder) as model:
        for number, ours in enumerate(all_of(found)):
            alone = model.generate(QUESTION + " Now!", IMAGES[:1], seed=4 + number, **DRAWN)
            same(replace(ours, others=()), alone)


def test_without_a_seed_and_at_temperature_0(engine: Engine) -> None:
    drawn = engine.generate(QUESTION, IMAGES[:1], n=4, **(DRAWN | {"temperature": 5.0}))
    assert len({tuple(one.token_ids) for one in all_of(drawn)}) == 4
    equal = engine.generate(QUESTION, IMAGES[:1], n=3, max_new_tokens=5)
    assert len({tuple(one.token_ids) for one in all_of(equal)}) == 1


# What is refused, and what it has no part in


def test_more_than_there_are_slots(engine: Engine) -> None:
    for ask_it in (engine.submit, engine.generate):
        with pytest.raises(ParameterError, match="n is 5, but this engine answers 4 at once"):
            ask_it(QUESTION, n=5)
    for wrong in (0, 129, True, "2", None):
        with pytest.raises(ParameterError, match=r"^n is .*; give an integer from 1 to 128"):
            engine.submit(QUESTION, n=wrong)  # type: ignore[arg-type]


def test_a_stream_has_one_answer(engine: Engine, folder: Path) -> None:
    with lvlm.load(folder) as model:
        for who in (model, engine):
            with pytest.raises(ParameterError, match="n is 2, but a stream has one answer; leave"):
                who.stream(QUESTION, n=2)
        tokens = model.generate("Hi", max_new_tokens=4).token_ids
        assert model.score("Hi", tokens, n=4).others == ()

    async def main() -> None:
        with pytest.raises(ParameterError, match="n is 2, but a stream has one answer"):
            await anext(AsyncEngine(engine).stream(QUESTION, n=2))

    asyncio.run(main())


# Handles


def test_handles_of_all_answers(engine: Engine) -> None:
    handle = engine.submit(QUESTION, IMAGES[:1], n=3, seed=2, **DRAWN)
    pieces = ["".join(one) for one in (handle, *handle.others)]
    answer = handle.result(WAIT)
    assert pieces == [one.text for one in all_of(answer)]
    for one, ours in zip((handle, *handle.others), all_of(answer), strict=True):
        assert one.token_ids == list(one.tokens()) == ours.token_ids
        assert one.others == (handle.others if one is handle else ())
    assert [one.result() for one in handle.others] == list(answer.others)
    assert not handle.cancel()


def test_on_an_event_loop(engine: Engine) -> None:
    async def main() -> None:
        there = AsyncEngine(engine)
        handle = await there.submit(QUESTION, IMAGES[:1], n=3, seed=2, **DRAWN)
        pieces = ["".join([piece async for piece in one]) for one in (handle, *handle.others)]
        answer = await handle
        assert pieces == [one.text for one in all_of(answer)]
        other = await there.generate(QUESTION, IMAGES[:1], n=2, seed=3, **DRAWN)
        same(other, replace(answer.others[0], others=answer.others[1:]))
        long = await there.submit(QUESTION, IMAGES[:1], n=3, **LONG)
        long.others[1].cancel()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await long
        for one in (long, *long.others):
            with pytest.raises(RequestCancelled):
                await one

    asyncio.run(asyncio.wait_for(main(), WAIT))


# How they end


def begun(engine: Engine, count: int = 4) -> Handle:
    """A group whose answers all have a token."""
    handle = engine.submit(QUESTION, IMAGES[:1], n=count, temperature=1.0, **LONG)
    for one in (handle, *handle.others):
        next(one.tokens())
    return handle


def test_one_of_them_is_cancelled(engine: Engine) -> None:
    handle = begun(engine, 3)
    assert handle.others[0].cancel()
    until(lambda: len(scheduler(engine).batch.running) == 2)
    alive = len(handle.token_ids)
    until(lambda: len(handle.token_ids) > alive and not handle.others[1].done)
    assert handle.cancel()
    for one in (handle, *handle.others):
        with pytest.raises(RequestCancelled):
            one.result(WAIT)


def test_the_first_alone_fails(engine: Engine) -> None:
    """The others have their answers; together they have none."""
    decode = intercept(engine, "decode")
    handle = engine.submit(QUESTION, IMAGES[:1], n=3, seed=2, **DRAWN)
    steps: list[int] = []

    def spoil(inputs: Any, outputs: Any) -> None:
        steps.append(len(inputs["input_ids"]))
        if steps[-1] == 3 and len(steps) > 3:
            outputs["logits"][0] = np.nan

    decode.after = spoil
    with pytest.raises(BackendError, match="NaN"):
        handle.result(WAIT)
    assert [len(one.result(WAIT).token_ids) for one in handle.others] == [14, 14]
    idle(engine)
    assert engine.generate("Hi", max_new_tokens=2, n=4).token_ids


@pytest.mark.parametrize("graph", ["vision", "extend"])
def test_a_prompt_that_cannot_be_read(graph: str, engine: Engine) -> None:
    faulty = intercept(engine, graph)

    def fail(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
        raise RuntimeError("out of luck")

    faulty.before = fail
    handle = engine.submit(QUESTION, IMAGES[:1], n=3, **DRAWN)
    for one in (handle, *handle.others):
        with pytest.raises(BackendError, match="out of luck"):
            one.result(WAIT)
    faulty.before = lambda inputs, outputs: None  # noqa: ARG005
    assert engine.generate("Hi", max_new_tokens=2, n=4).token_ids


def test_cancelled_in_the_queue(engine: Engine, folder: Path) -> None:
    """Whoever is left is read and answered, the first one's place taken by the next."""
    first = begun(engine)
    waiting = engine.submit(QUESTION, IMAGES[:1], n=3, seed=5, **DRAWN)
    behind = engine.submit("Hi", max_new_tokens=2)
    none = engine.submit(QUESTION, n=2, **DRAWN)
    none.cancel()
    assert waiting._cancel()  # this answer alone: to cancel the handle is to cancel all
    assert waiting.others[1].cancel()
    until(lambda: engine.stats().waiting == 2)
    assert not behind.done
    first.cancel()
    with lvlm.load(folder) as model:
        same(
            waiting.others[0].result(WAIT),
            model.generate(QUESTION, IMAGES[:1], seed=6, **DRAWN),
        )
    assert behind.result(WAIT).token_ids
    with pytest.raises(RequestCancelled):
        waiting.result(WAIT)


def test_cancelled_in_prefill(whole: Engine) -> None:
    """It is stopped when nobody waits any more, and not before."""
    engine = whole
    held = Held(engine, "prefill")
    handle = engine.submit(QUESTION, IMAGES[:1], n=3, **LONG)
    assert held.reached.wait(WAIT)
    reading = scheduler(engine)._prefilling
    assert reading is not None
    handle._cancel()
    handle.others[0].cancel()
    scheduler(engine).wake()
    assert not reading.stopped
    handle.others[1].cancel()
    assert reading.stopped
    held.go.set()
    for one in (handle, *handle.others):
        with pytest.raises(RequestCancelled):
            one.result(WAIT)
    idle(engine)


def test_one_is_cancelled_in_prefill(whole: Engine) -> None:
    engine = whole
    held = Held(engine, "prefill")
    handle = engine.submit(QUESTION, IMAGES[:1], n=3, **DRAWN)
    assert held.reached.wait(WAIT)
    handle.others[0].cancel()
    held.go.set()
    assert len(handle.others[1].result(WAIT).token_ids) == 14
    with pytest.raises(RequestCancelled):
        handle.result(WAIT)
    assert len(handle.token_ids) == 14


def test_out_of_time(engine: Engine) -> None:
    slow, gate = intercept(engine, "decode"), threading.Event()
    slow.before = lambda inputs, outputs: gate.wait(0.02) and None  # noqa: ARG005
    running = engine.submit(QUESTION, IMAGES[:1], n=4, timeout=0.5, **LONG)
    waiting = engine.submit(QUESTION, n=2, timeout=0.05, **LONG)
    for one in (running, *running.others, waiting, *waiting.others):
        with pytest.raises(RequestTimeout):
            one.result(WAIT)
    assert waiting.token_ids == []
    gate.set()
    assert engine.generate("Hi", max_new_tokens=2, n=4).token_ids


def test_the_engine_is_closed_first(folder: Path) -> None:
    with Engine(folder, slots=4) as engine:
        running = begun(engine, 3)
        waiting = engine.submit(QUESTION, n=3, **LONG)
    for one in (running, *running.others, waiting, *waiting.others):
        with pytest.raises(EngineClosedError):
            one.result(WAIT)


def test_a_queue_that_is_full(folder: Path) -> None:
    """A list waits for its own answers, all of each."""
    with Engine(folder, slots=2, queue_limit=1) as engine:
        found = engine.generate(["Hi", QUESTION, "Read the top row."] * 2, n=2, seed=1, **DRAWN)
        assert [len(all_of(one)) for one in found] == [2] * 6
        idle(engine)


def test_other_requests_are_answered_in_turn(engine: Engine) -> None:
    """A group waits for its slots; nobody overtakes it."""
    running = engine.submit(QUESTION, **LONG)
    next(running.tokens())
    group = engine.submit(QUESTION, IMAGES[:1], n=4, **DRAWN)
    behind = engine.submit("Hi", max_new_tokens=1)
    until(lambda: len(running.token_ids) > 30)
    assert group.token_ids == behind.token_ids == []
    running.cancel()
    assert behind.result(WAIT).token_ids
    assert group.result(WAIT)
    assert group.token_times[0] < behind.token_times[0]


def test_a_model_that_fails_with_some_of_them(folder: Path) -> None:
    with lvlm.load(folder) as model:
        decode = intercept(model, "decode")
        good = model.generate(QUESTION, IMAGES[:1], n=3, seed=2, **DRAWN)

        def spoil(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
            outputs["logits"][1] = np.inf

        decode.after = spoil
        with pytest.raises(BackendError, match="NaN or infinity"):
            model.generate(QUESTION, IMAGES[:1], n=3, seed=2, **DRAWN)
        decode.after = lambda inputs, outputs: None  # noqa: ARG005
        again = model.generate(QUESTION, IMAGES[:1], n=3, seed=2, **DRAWN)
        assert [one.token_ids for one in all_of(again)] == [one.token_ids for one in all_of(good)]


def test_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(folder), "Hi", "--n", "3", "--seed", "2", "--max-new-tokens", "8"]
    assert main(argv) == 2
    assert "--n has no effect at temperature 0" in capsys.readouterr().err
    assert main([*argv, "--temperature", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    with lvlm.load(folder) as model:
        one = model.generate("Hi", n=3, seed=2, temperature=2.0, max_new_tokens=8)
    assert [told["text"], *(o["text"] for o in told["others"])] == [o.text for o in all_of(one)]
    assert main([*argv, "--temperature", "2"]) == 0
    said = "".join(f"[{i}] {o.text}\n" for i, o in enumerate(all_of(one), 1))
    assert capsys.readouterr().out == said


@pytest.mark.usefixtures("trt")
def test_rows_of_device_memory(built: Make) -> None:
    """Copied where they lie: engines of TensorRT, with queries and compaction."""
    folder, options = built("interval"), DRAWN | {"kv_keep": 0.5}
    with (
        lvlm.load(folder, device="tensorrt-rtx") as model,
        Engine(folder, device="tensorrt-rtx", slots=2) as engine,
    ):
        expected = [model.generate(QUESTION, IMAGES[:1], seed=s, **options) for s in (3, 4)]
        for who in (model, engine):
            found = who.generate(QUESTION, IMAGES[:1], n=2, seed=3, **options)
            for ours, theirs in zip(all_of(found), expected, strict=True):
                same(replace(ours, others=()), theirs)
        idle(engine)
