"""What an engine tells of itself: counts, speed, a line in the debugger."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_tools import IMAGES, LONG, QUESTION, WAIT, idle, running

import lvlm
from lvlm.runtime.engine import Engine
from lvlm.runtime.engine.stats import Meter


@pytest.fixture
def slots() -> int:
    return 1


def test_counts(engine: Engine) -> None:
    fresh = engine.stats()
    assert (fresh.submitted, fresh.tokens_per_second, fresh.cache_bytes_used) == (0, 0.0, 0)
    assert fresh.cache_bytes == engine.memory().cache
    handle = running(engine)
    second = engine.submit(QUESTION, IMAGES[:1], max_new_tokens=3, ignore_eos=True)
    now = engine.stats()
    assert (now.running, now.waiting, now.submitted, now.answered) == (1, 1, 2, 0)
    assert 0 < now.cache_bytes_used < now.cache_bytes
    assert (now.image_hits, now.image_misses) == (0, 1)
    assert now.tokens_per_second > 0
    handle.cancel()
    answer = second.result(WAIT)
    idle(engine)
    now = engine.stats()
    assert (now.running, now.waiting, now.submitted, now.answered) == (0, 0, 2, 1)
    assert now.new_tokens >= 1 + 3
    assert now.prompt_tokens == 2 * answer.stats.prompt_tokens
    assert now.reused_tokens == answer.stats.reused_tokens
    assert now.image_hits + now.image_misses == (1 if now.reused_tokens else 2)


def test_speed_is_that_of_the_last_seconds() -> None:
    now = 100.0
    meter = Meter(lambda: now)
    for _ in range(20):
        now += 0.1
        meter.token()
    assert meter.tokens_per_second() == pytest.approx(10)
    now += 6
    assert meter.tokens_per_second() == pytest.approx(20 / 8)
    now += 30
    assert meter.tokens_per_second() == 0


def test_reprs_say_something(engine: Engine, folder: Path) -> None:
    assert repr(engine) == f"<lvlm.Engine {folder} on cpu: 1 slots, 0 running, 0 waiting>"
    handle = running(engine)
    assert repr(handle).startswith("<lvlm.Handle: going on, ")
    handle.cancel()
    assert repr(handle).startswith("<lvlm.Handle: RequestCancelled, ")
    with engine.stream("Hi", max_new_tokens=2, ignore_eos=True) as stream:
        assert repr(stream) == "<lvlm.Stream: going on, 0 pieces>"
        pieces = len(list(stream))
        assert repr(stream) == f"<lvlm.Stream: ended by length, {pieces} pieces>"
    with lvlm.load(folder) as model:
        what = f"<lvlm.Model {folder} on cpu: llava, float32, recipe none"
        assert repr(model) == what + ">"
    assert repr(model) == what + ", closed>"


def test_model_and_engine_offer_the_same_calls(engine: Engine, folder: Path) -> None:
    prompts, images = ["Hi", QUESTION, "Ho"], [None, IMAGES[:1], []]
    options = lvlm.GenerationOptions(max_new_tokens=3, temperature=2.0, seed=5)
    with lvlm.load(folder) as model:
        alone = [
            model.generate(p, i, options=options, seed=5 + row)
            for row, (p, i) in enumerate(zip(prompts, images, strict=True))
        ]
        for one in (model, engine):
            answers = one.generate(prompts, images, options=options)
            assert [a.token_ids for a in answers] == [a.token_ids for a in alone]
            assert one.generate([]) == []
            with one.stream(QUESTION, IMAGES[:1], options=options, seed=6) as stream:
                first = next(stream)
                assert first + "".join(stream) == alone[1].text
            assert stream.result is not None
            assert stream.result.token_ids == alone[1].token_ids


def test_a_list_may_be_longer_than_the_queue(folder: Path) -> None:
    with Engine(folder, slots=1, queue_limit=1) as engine:
        answers = engine.generate(["Hi"] * 5, max_new_tokens=2)
        assert len({tuple(a.token_ids) for a in answers}) == 1
        idle(engine)
        with (
            running(engine) as first,
            engine.submit("Hi", **LONG) as second,
            pytest.raises(lvlm.QueueFullError),
        ):
            engine.generate(["Hi"])
        for handle in (first, second):
            with pytest.raises(lvlm.RequestCancelled):
                handle.result(WAIT)


def test_a_closed_stream_frees_the_slot(engine: Engine) -> None:
    with engine.stream("Hi", **LONG) as stream:
        next(stream)
    assert len(engine.generate("Hi", max_new_tokens=2).token_ids) <= 2
    with engine.stream("Hi", **LONG):
        pass  # never read
    idle(engine)
    assert engine.stats().running == 0
