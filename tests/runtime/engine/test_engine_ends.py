"""How requests end before their answer: cancelled, or out of time."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from engine_tools import (
    IMAGES,
    LONG,
    QUESTION,
    WAIT,
    Held,
    idle,
    intercept,
    running,
    scheduler,
    until,
)

from lvlm.core.errors import EngineClosedError, RequestCancelled, RequestTimeout
from lvlm.runtime.engine import Engine, Handle


@pytest.fixture
def slots() -> int:
    return 1


# Cancelled


def test_cancelled_in_the_queue(engine: Engine) -> None:
    first = running(engine)
    # Equal requests, of which the later one goes
    waiting = [engine.submit("Hi", max_new_tokens=2) for _ in range(3)]
    assert waiting[1].cancel()
    with pytest.raises(RequestCancelled):
        waiting[1].result(0)
    first.cancel()
    assert [len(waiting[i].result(WAIT).token_ids) for i in (0, 2)] == [2, 2]


def test_cancelled_in_prefill(whole: Engine) -> None:
    """What is read for nobody is stopped; the caller does not wait for that."""
    held = Held(whole, "prefill")
    handle = whole.submit(QUESTION, IMAGES[:1], **LONG)
    after = whole.submit("Hi", max_new_tokens=2)
    assert held.reached.wait(WAIT)
    assert handle.cancel()
    with pytest.raises(RequestCancelled):
        handle.result(0)
    reading = scheduler(whole)._prefilling
    assert reading is not None
    assert reading.stopped
    held.go.set()
    assert len(after.result(WAIT).token_ids) == 2


def test_cancelled_in_decode(engine: Engine) -> None:
    handle = running(engine)
    assert handle.cancel()
    assert not handle.cancel()  # it had ended
    with pytest.raises(RequestCancelled):
        handle.result(0)
    until(lambda: not scheduler(engine).batch.slots.running)
    count = len(handle.token_ids)
    assert engine.generate("Hi", max_new_tokens=2).token_ids
    assert len(handle.token_ids) == count > 0
    with pytest.raises(RequestCancelled):
        list(handle)


def test_cancelled_by_another_thread_while_one_reads(engine: Engine) -> None:
    handle, read = running(engine), []

    def reader() -> None:
        try:
            read.extend(handle.tokens())
        except RequestCancelled as error:
            read.append(error)  # type: ignore[arg-type]

    threads = [threading.Thread(target=reader), threading.Thread(target=handle.cancel)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert isinstance(read[-1], RequestCancelled)
    assert read[:-1] == handle.token_ids


def test_cancelled_after_its_end(engine: Engine) -> None:
    handle = engine.submit("Hi", max_new_tokens=2)
    answer = handle.result(WAIT)
    assert not handle.cancel()
    assert handle.result(0) is answer
    assert list(handle.tokens()) == answer.token_ids


def test_a_consumer_that_stops_reading(engine: Engine) -> None:
    """The answer is finished without it, and nobody else waits."""
    handle = engine.submit(QUESTION, IMAGES[:1], max_new_tokens=30, ignore_eos=True)
    reader = iter(handle)
    next(reader)
    assert engine.generate("Hi", max_new_tokens=2).token_ids
    answer = handle.result(WAIT)
    assert len(answer.token_ids) == 30
    assert answer.text.endswith("".join(reader))


def test_generate_that_is_interrupted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would read the rest."""

    def interrupted(self: Handle, timeout: float | None = None) -> None:  # noqa: ARG001
        next(self.tokens())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Handle, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(QUESTION, **LONG)
    idle(engine)


# Out of time


def test_out_of_time_in_the_queue_and_in_decode(engine: Engine) -> None:
    decode = intercept(engine, "decode")
    gate = threading.Event()
    first = engine.submit(QUESTION, IMAGES[:1], timeout=0.5, **LONG)
    waiting = engine.submit("Hi", timeout=0.05)
    decode.before = lambda inputs, outputs: gate.wait(0.05) and None  # noqa: ARG005
    with pytest.raises(RequestTimeout, match="the request's timeout is over"):
        waiting.result(WAIT)
    assert waiting.token_ids == []
    with pytest.raises(TimeoutError):  # Python's own, too
        first.result(WAIT)
    assert first.token_ids
    gate.set()
    assert engine.generate("Hi", max_new_tokens=2, timeout=WAIT).token_ids


def test_out_of_time_in_prefill(whole: Engine) -> None:
    held = Held(whole, "prefill")
    handle = whole.submit(QUESTION, timeout=0.05)
    with pytest.raises(RequestTimeout):
        handle.result(WAIT)
    assert held.reached.is_set()
    reading = scheduler(whole)._prefilling
    assert reading is not None
    until(lambda: reading.stopped)
    held.go.set()
    assert whole.generate("Hi", max_new_tokens=2).token_ids


def test_out_of_time_while_another_prompt_is_read(folder: Path) -> None:
    """Whoever waits or runs is told in time, from a thread that may close the engine."""
    with Engine(folder, slots=3, chunk_tokens=0, reuse_prefixes=False) as engine:
        held = Held(engine, "prefill")
        held.go.set()
        first = running(engine)
        held.reached.clear()
        held.go.clear()
        (request,) = scheduler(engine).batch.running
        request.deadline = time.perf_counter() + 2.0
        read = engine.submit("Hi", **LONG)
        assert held.reached.wait(WAIT)
        waiting = engine.submit("Hi", timeout=0.05)
        ended = threading.Event()

        def told() -> None:
            if first.done:
                threading.Thread(target=held.go.set).start()
                engine.close()
                ended.set()

        first.subscribe(told)
        with pytest.raises(RequestTimeout):
            first.result(WAIT)
        assert ended.wait(WAIT)
        with pytest.raises((EngineClosedError, RequestTimeout)):
            waiting.result(WAIT)
        with pytest.raises(EngineClosedError, match="closed before the answer"):
            read.result(WAIT)


@pytest.mark.parametrize("timeout", [1e300, float("inf")])
def test_all_the_time_in_the_world(timeout: float, whole: Engine) -> None:
    held = Held(whole, "prefill")
    handle = whole.submit(QUESTION, timeout=timeout, max_new_tokens=2)
    held.reached.wait(WAIT)
    held.go.set()
    assert handle.result(WAIT).token_ids


def test_a_short_wait_is_not_the_end(engine: Engine) -> None:
    handle = running(engine)
    with pytest.raises(TimeoutError, match=r"no answer after 0.01 s; wait longer, or cancel"):
        handle.result(0.01)
    assert not handle.done
    handle.cancel()
