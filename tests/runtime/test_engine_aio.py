"""The engine on an event loop, which it never blocks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_tools import LONG, PICTURES, QUESTION, WAIT, ask, idle, intercept, same, scheduler

import lvlm
from lvlm.runtime.engine import AsyncEngine, Engine
from lvlm.runtime.errors import EngineClosedError, ParameterError, RequestCancelled, RequestTimeout


@pytest.fixture(scope="module")
def folder(bundle: Callable[..., Path]) -> Path:
    return bundle("tiny-llava", max_images=2)


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with Engine(folder, slots=2) as engine:
        yield engine
        idle(engine)


def run(main: Coroutine[Any, Any, Any]) -> None:
    asyncio.run(asyncio.wait_for(main, WAIT))


def test_many_at_once(folder: Path, engine: Engine) -> None:
    asks = [ask(p, (i % 2,), max_new_tokens=3 + i) for i, p in enumerate(["Hi", QUESTION] * 4)]
    with lvlm.load(folder) as model:
        expected = [a.alone(model) for a in asks]

    async def one(a: Any, by_pieces: bool) -> Any:
        handle = await AsyncEngine(engine).submit(*a.arguments, **a.options)
        if by_pieces:
            pieces = [piece async for piece in handle]
            assert all(pieces)
            assert "".join(pieces) == (await handle).text
        return await handle

    async def main() -> None:
        answers = await asyncio.gather(*(one(a, i % 2 == 0) for i, a in enumerate(asks)))
        for ours, theirs in zip(answers, expected, strict=True):
            same(ours, theirs)

    run(main())


def test_the_loop_goes_on_while_the_engine_works(engine: Engine) -> None:
    """A graph waits for something that only the loop can do."""
    gate = threading.Event()
    prefill = intercept(engine, "prefill")
    prefill.before = lambda inputs, outputs: gate.wait(WAIT) and None  # noqa: ARG005

    async def main() -> None:
        handle = await AsyncEngine(engine).submit(QUESTION, PICTURES[:1], max_new_tokens=3)
        waiting = asyncio.create_task(handle._answer())
        await asyncio.sleep(0)
        assert not waiting.done()
        gate.set()
        assert (await waiting).token_ids

    run(main())


@pytest.mark.parametrize("by_pieces", [True, False])
def test_a_cancelled_task_cancels_its_request(by_pieces: bool, engine: Engine) -> None:
    async def main() -> None:
        handle = await AsyncEngine(engine).submit(QUESTION, PICTURES[:1], **LONG)
        read = asyncio.Event()

        async def consumer() -> None:
            async for _ in handle:
                read.set()

        async def waiter() -> None:
            read.set()
            await handle

        task = asyncio.create_task(consumer() if by_pieces else waiter())
        await read.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert handle.handle.done
        with pytest.raises(RequestCancelled):
            await handle
        assert not handle.cancel()

    run(main())


def test_out_of_time(engine: Engine) -> None:
    """The caller's patience, and the request's own."""

    async def main() -> None:
        asynchronous = AsyncEngine(engine)
        handle = await asynchronous.submit(QUESTION, PICTURES[:1], **LONG)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await handle
        with pytest.raises(RequestCancelled):
            await handle
        handle = await asynchronous.submit(QUESTION, PICTURES[:1], timeout=0.05, **LONG)
        with pytest.raises(RequestTimeout):
            async for _ in handle:
                pass

    run(main())


def test_cancelled_while_it_is_being_submitted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody gets its handle, so nobody could cancel it any more."""
    entered, gate, submit = threading.Event(), threading.Event(), engine.submit
    handles = []

    def slow(*arguments: Any, **options: Any) -> Any:
        entered.set()
        assert gate.wait(WAIT)
        handles.append(submit(*arguments, **options))
        return handles[0]

    monkeypatch.setattr(engine, "submit", slow)

    async def main() -> None:
        task = asyncio.create_task(AsyncEngine(engine).submit(QUESTION, **LONG))
        await asyncio.to_thread(entered.wait, WAIT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()
        while not (handles and handles[0].done):
            await asyncio.sleep(0.001)

    run(main())
    with pytest.raises(RequestCancelled):
        handles[0].result(0)


def test_mistakes_and_the_end(folder: Path) -> None:
    async def main() -> None:
        async with AsyncEngine(Engine(folder, slots=1)) as engine:
            with pytest.raises(ParameterError, match="max_new_tokens"):
                await engine.submit("Hi", max_new_tokens=0)
            handle = await engine.submit("Hi", max_new_tokens=4, ignore_eos=True)
            left = await engine.submit(QUESTION, **LONG)
            assert len((await handle).token_ids) == 4
        with pytest.raises(EngineClosedError):
            await left
        with pytest.raises(EngineClosedError):
            await engine.submit("Hi")

    run(main())


def test_a_loop_that_has_gone(engine: Engine) -> None:
    """The request goes on, and the engine does not stumble."""
    gate = threading.Event()
    prefill = intercept(engine, "prefill")
    prefill.before = lambda inputs, outputs: gate.wait(WAIT) and None  # noqa: ARG005

    async def main() -> Any:
        return await AsyncEngine(engine).submit("Hi", max_new_tokens=3, ignore_eos=True)

    handle = asyncio.run(main())
    gate.set()
    assert len(handle.handle.result(WAIT).token_ids) == 3
    assert scheduler(engine)._thread.is_alive()
