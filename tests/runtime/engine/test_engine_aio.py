"""The engine on an event loop, which it never blocks."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from engine_tools import IMAGES, LONG, QUESTION, WAIT, ask, idle, intercept, same, scheduler

import lvlm
from lvlm.core.errors import EngineClosedError, ParameterError, RequestCancelled, RequestTimeout
from lvlm.runtime.engine import Engine
from lvlm.runtime.engine.aio import AsyncEngine


@pytest.fixture
def slots() -> int:
    return 2


def run(main: Coroutine[Any, Any, Any]) -> None:
    asyncio.run(asyncio.wait_for(main, WAIT))


def test_it_is_made_of_an_engine() -> None:
    with pytest.raises(ParameterError, match=r"engine is 'out/'; give lvlm.AsyncEngine\(lvlm.Eng"):
        AsyncEngine("out/")  # type: ignore[arg-type]


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
    prefill = intercept(engine, "extend")
    prefill.before = lambda inputs, outputs: gate.wait(WAIT) and None  # noqa: ARG005

    async def main() -> None:
        handle = await AsyncEngine(engine).submit(QUESTION, IMAGES[:1], max_new_tokens=3)
        waiting = asyncio.create_task(handle._answer())
        await asyncio.sleep(0)
        assert not waiting.done()
        gate.set()
        assert (await waiting).token_ids

    run(main())


@pytest.mark.parametrize("by_pieces", [True, False])
def test_a_cancelled_task_cancels_its_request(by_pieces: bool, engine: Engine) -> None:
    async def main() -> None:
        handle = await AsyncEngine(engine).submit(QUESTION, IMAGES[:1], **LONG)
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
        handle = await asynchronous.submit(QUESTION, IMAGES[:1], **LONG)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await handle
        with pytest.raises(RequestCancelled):
            await handle
        handle = await asynchronous.submit(QUESTION, IMAGES[:1], timeout=0.05, **LONG)
        with pytest.raises(RequestTimeout):
            async for _ in handle:
                pass

    run(main())


def test_cancelled_while_it_is_being_prepared(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody gets its handle, so it is never asked."""
    entered, gate, ended, prepare = *(threading.Event() for _ in range(3)), engine.admission.prepare

    def slow(*arguments: Any) -> Any:
        entered.set()
        assert gate.wait(WAIT)
        request = prepare(*arguments)
        ended.set()
        return request

    monkeypatch.setattr(engine.admission, "prepare", slow)

    async def main() -> None:
        task = asyncio.create_task(AsyncEngine(engine).submit(QUESTION, **LONG))
        await asyncio.to_thread(entered.wait, WAIT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()
        await asyncio.to_thread(ended.wait, WAIT)

    run(main())
    assert engine.stats().submitted == 0


def test_answers_at_once(folder: Path) -> None:
    """``generate`` is Engine.generate: lists, seeds of rows, a queue that is too short."""
    options = lvlm.GenerationOptions(max_new_tokens=3, temperature=2.0, seed=5)
    prompts = ["Hi", QUESTION, "Ho", "Hu"]

    async def main() -> None:
        async with AsyncEngine(Engine(folder, slots=1, queue_limit=1)) as engine:
            expected = await asyncio.to_thread(engine.engine.generate, prompts, options=options)
            answers = await engine.generate(prompts, options=options)
            assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
            assert (await engine.generate("Hi", options=options)).text == expected[0].text
            pieces = [piece async for piece in engine.stream("Hi", options=options)]
            assert "".join(pieces) == expected[0].text
            assert engine.stats().answered == 4 + 4 + 1 + 1
            assert engine.memory().slots == 1
            assert repr(engine).startswith("<lvlm.AsyncEngine over <lvlm.Engine ")

    run(main())


def test_a_cancelled_list_cancels_its_requests(engine: Engine) -> None:
    async def main() -> None:
        task = asyncio.create_task(AsyncEngine(engine).generate(["Hi"] * 4, **LONG))
        while engine.stats().submitted < 4:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    idle(engine)
    assert engine.stats().answered == 0


def test_a_handle_left_behind_is_cancelled(engine: Engine) -> None:
    async def main() -> None:
        async with await AsyncEngine(engine).submit("Hi", **LONG) as handle:
            async for _ in handle:
                break
        with pytest.raises(RequestCancelled):
            await handle
        async with contextlib.aclosing(AsyncEngine(engine).stream("Hi", **LONG)) as pieces:
            async for _ in pieces:
                break

    run(main())
    idle(engine)


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
    prefill = intercept(engine, "extend")
    prefill.before = lambda inputs, outputs: gate.wait(WAIT) and None  # noqa: ARG005

    async def main() -> Any:
        return await AsyncEngine(engine).submit("Hi", max_new_tokens=3, ignore_eos=True)

    handle = asyncio.run(main())
    gate.set()
    assert len(handle.handle.result(WAIT).token_ids) == 3
    assert scheduler(engine)._thread.is_alive()
