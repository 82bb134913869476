"""How engines end: closed, dropped, with the interpreter."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from engine_tools import IMAGES, LONG, QUESTION, WAIT, Held, intercept, running, scheduler, until

from lvlm.core.errors import BackendError, EngineClosedError
from lvlm.runtime.engine import Engine

pytestmark = pytest.mark.usefixtures("own_sessions")


def test_closed_while_busy(folder: Path) -> None:
    engine = Engine(folder, slots=2)
    handles = [running(engine), *(engine.submit(QUESTION, IMAGES[1:], **LONG) for _ in range(4))]
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

    def listener() -> None:
        if threading.current_thread() is scheduler(engine)._thread:
            engine.close(finish=True)  # which cannot wait for itself

    handle.subscribe(listener)
    until(lambda: scheduler(engine)._closing == "finish")
    engine.close()
    with pytest.raises(EngineClosedError):
        handle.result(0)


def test_closed_while_a_prompt_is_read(folder: Path) -> None:
    """Its graph is stopped at the next node, and it is told what all others are."""
    engine = Engine(folder, slots=2, chunk_tokens=0)
    held = Held(engine, "prefill")
    handle = engine.submit(QUESTION, IMAGES[:1], **LONG)
    assert held.reached.wait(WAIT)
    reading = scheduler(engine)._prefilling
    assert reading is not None
    closing = threading.Thread(target=engine.close)
    closing.start()
    until(lambda: reading.stopped)
    held.go.set()
    closing.join(WAIT)
    with pytest.raises(EngineClosedError, match="closed before the answer"):
        handle.result(0)
    assert handle.token_ids == []


def test_closing_frees_everything(folder: Path) -> None:
    """Even if someone keeps the engine, its handles and their errors."""
    engine = Engine(folder, slots=2)
    buffers = scheduler(engine).batch.slots.cache.buffers
    alive = [weakref.ref(buffer) for buffer in buffers.values()]
    decode = intercept(engine, "decode")

    def fail(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
        raise KeyError("odd")

    decode.before = fail
    handle = engine.submit(QUESTION, IMAGES[:1])
    with pytest.raises(BackendError, match="odd") as caught:
        handle.result(WAIT)
    waiting = engine.submit(QUESTION, IMAGES[:1])
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
        [sys.executable, "-c", EXIT + how, str(folder), str(IMAGES[0])],
        capture_output=True,
        text=True,
        timeout=WAIT,
    )
    assert done.stdout == "busy\n"
    assert done.returncode == {"sys.exit(3)": 3}.get(how, 1 if how.startswith("raise") else 0)
    errors = done.stderr.strip().splitlines()
    assert errors[-1:] == (["ValueError: mine"] if how.startswith("raise") else [])
