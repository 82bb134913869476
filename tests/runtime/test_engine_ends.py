"""How requests and engines end: cancelled, out of time, closed, dropped, with the interpreter."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_tools import PICTURES, QUESTION, WAIT, idle, intercept, scheduler, until

from lvlm.runtime.engine import Engine, Handle
from lvlm.runtime.errors import BackendError, EngineClosedError, RequestCancelled, RequestTimeout

LONG: dict[str, Any] = {"max_new_tokens": 1000, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(bundle: Callable[..., Path]) -> Path:
    return bundle("tiny-llava", max_images=2)


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with Engine(folder, slots=1) as engine:
        yield engine
        idle(engine)


class Held:
    """A graph that waits to be let go. ``reached`` is set when it has been called."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        intercept(engine, name).before = self.hold

    def hold(self, inputs: Any, outputs: Any) -> None:  # noqa: ARG002
        self.reached.set()
        assert self.go.wait(WAIT)


def running(engine: Engine, **options: Any) -> Handle:
    """A request that has a token."""
    handle = engine.submit(QUESTION, PICTURES[:1], **(LONG | options))
    next(handle.tokens())
    return handle


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


def test_cancelled_in_prefill(engine: Engine) -> None:
    """What is read for nobody is stopped; the caller does not wait for that."""
    held = Held(engine, "prefill")
    handle = engine.submit(QUESTION, PICTURES[:1], **LONG)
    after = engine.submit("Hi", max_new_tokens=2)
    assert held.reached.wait(WAIT)
    assert handle.cancel()
    with pytest.raises(RequestCancelled):
        handle.result(0)
    reading = scheduler(engine)._prefilling
    assert reading is not None
    until(lambda: reading.stopped)
    held.go.set()
    assert type(reading.logits.exception(WAIT)) is BackendError  # it did not run to its end
    assert len(after.result(WAIT).token_ids) == 2


def test_cancelled_in_decode(engine: Engine) -> None:
    handle = running(engine)
    assert handle.cancel()
    assert not handle.cancel()  # it had ended
    with pytest.raises(RequestCancelled):
        handle.result(0)
    until(lambda: not scheduler(engine).slots.running)
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
    handle = engine.submit(QUESTION, PICTURES[:1], max_new_tokens=30, ignore_eos=True)
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
    first = engine.submit(QUESTION, PICTURES[:1], timeout=0.5, **LONG)
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


def test_out_of_time_in_prefill(engine: Engine) -> None:
    held = Held(engine, "prefill")
    handle = engine.submit(QUESTION, timeout=0.05)
    with pytest.raises(RequestTimeout):
        handle.result(WAIT)
    held.go.set()
    assert engine.generate("Hi", max_new_tokens=2).token_ids


@pytest.mark.parametrize("timeout", [1e300, float("inf")])
def test_all_the_time_in_the_world(timeout: float, engine: Engine) -> None:
    held = Held(engine, "prefill")
    handle = engine.submit(QUESTION, timeout=timeout, max_new_tokens=2)
    held.reached.wait(WAIT)
    scheduler(engine).wake()  # it sleeps until then, as long as it may
    held.go.set()
    assert handle.result(WAIT).token_ids


def test_a_short_wait_is_not_the_end(engine: Engine) -> None:
    handle = running(engine)
    with pytest.raises(TimeoutError, match=r"no answer after 0.01 s; wait longer, or cancel"):
        handle.result(0.01)
    assert not handle.done
    handle.cancel()


# Closed


def test_closed_while_busy(folder: Path) -> None:
    engine = Engine(folder, slots=2)
    handles = [running(engine), *(engine.submit(QUESTION, PICTURES[1:], **LONG) for _ in range(4))]
    engine.close()
    errors = []
    for handle in handles:
        with pytest.raises(EngineClosedError, match="closed before the answer") as caught:
            handle.result(0)
        errors.append(caught.value)
    assert len(set(map(id, errors))) == 5
    with pytest.raises(EngineClosedError, match="this engine is closed; open the bundle again"):
        engine.submit("Hi")
    engine.close()
    engine.close(finish=True)
    assert engine.memory().slots == 2


def test_finished_first(folder: Path) -> None:
    engine = Engine(folder, slots=2)
    handles = [engine.submit("Hi", max_new_tokens=9, ignore_eos=True) for _ in range(5)]
    closing = threading.Thread(target=engine.close, kwargs={"finish": True})
    closing.start()
    until(lambda: scheduler(engine)._closing is not None)
    with pytest.raises(EngineClosedError):
        engine.submit("Hi")
    assert [len(handle.result(WAIT).token_ids) for handle in handles] == [9] * 5
    closing.join(WAIT)
    assert not closing.is_alive()


def test_finishing_is_cut_short(folder: Path) -> None:
    engine = Engine(folder, slots=1)
    handle = running(engine)
    handle.subscribe(lambda: scheduler(engine).close(finish=True))  # the engine's own thread
    until(lambda: scheduler(engine)._closing == "finish")
    engine.close()
    with pytest.raises(EngineClosedError):
        handle.result(0)


def test_closing_frees_everything(folder: Path) -> None:
    """Even if someone keeps the engine, its handles and their errors."""
    engine = Engine(folder, slots=2)
    buffers = scheduler(engine).slots.cache.buffers
    alive = [weakref.ref(buffer) for buffer in buffers.values()]
    decode = intercept(engine, "decode")

    def fail(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
        raise KeyError("odd")

    decode.before = fail
    handle = engine.submit(QUESTION, PICTURES[:1])
    with pytest.raises(BackendError, match="odd") as caught:
        handle.result(WAIT)
    waiting = engine.submit(QUESTION, PICTURES[:1])
    engine.close()
    del buffers, decode
    gc.collect()
    assert [ref for ref in alive if ref() is not None] == []
    assert caught.value is handle._error
    assert waiting.done


@pytest.mark.parametrize("busy", [False, True])
def test_dropped_without_close(busy: bool, folder: Path) -> None:
    """Its threads end, and its requests."""
    engine = Engine(folder, slots=1)
    thread = scheduler(engine)._thread
    handle = running(engine) if busy else engine.submit("Hi", max_new_tokens=1)
    if not busy:
        handle.result(WAIT)
    del engine
    gc.collect()
    thread.join(WAIT)
    assert not thread.is_alive()
    if busy:
        with pytest.raises(EngineClosedError):
            handle.result(WAIT)
    until(lambda: not any(t.name == "lvlm-prefill" for t in threading.enumerate()))


EXIT = """
import sys, threading
from lvlm.runtime.engine import Engine

engine = Engine(sys.argv[1], threads=1, slots=2)
handles = [engine.submit("Hi", sys.argv[2:], max_new_tokens=1000, ignore_eos=True)
           for _ in range(20)]
next(handles[0].tokens())
print("busy", flush=True)
"""


@pytest.mark.parametrize("how", ["", "del engine", "sys.exit(3)", "raise ValueError('mine')"])
def test_the_interpreter_exits_while_it_is_busy(how: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXIT + how, str(folder), str(PICTURES[0])],
        capture_output=True,
        text=True,
        timeout=WAIT,
    )
    assert done.stdout == "busy\n"
    assert done.returncode == {"sys.exit(3)": 3}.get(how, 1 if how.startswith("raise") else 0)
    errors = done.stderr.strip().splitlines()
    assert errors[-1:] == (["ValueError: mine"] if how.startswith("raise") else [])
