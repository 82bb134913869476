"""Answers as they come, of several handles at once: one task follows all of a request's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from lvlm.runtime.engine.handle import Handle, News


@dataclass(frozen=True)
class AnswerUpdate:
    """News of answer ``index``; ``ended``: nothing more follows."""

    index: int
    news: News
    ended: bool


async def follow(handles: Sequence[Handle]) -> AsyncGenerator[AnswerUpdate]:
    """Yield what is new, of whichever answer, until all have ended; those that failed raise at the
    end of theirs. All are cancelled where the consumer leaves."""
    changed, loop = asyncio.Event(), asyncio.get_running_loop()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(changed.set)

    read, going = [0] * len(handles), set(range(len(handles)))
    for handle in handles:
        handle.subscribe(tell)
    try:
        while going:
            await changed.wait()
            changed.clear()
            for index in sorted(going):
                ended = handles[index].done  # before what is new: nothing comes after that
                news = handles[index].since(read[index])
                read[index] += len(news.tokens)
                if ended:
                    handles[index].check()
                    going.remove(index)
                if news.tokens or ended:
                    yield AnswerUpdate(index, news, ended)
    finally:
        for handle in handles:
            handle.cancel()
