"""The engine for asyncio: nothing here blocks the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Generator
from functools import partial
from types import TracebackType
from typing import Self, Unpack

from lvlm.runtime.answers import Generation
from lvlm.runtime.asks import Images, Videos
from lvlm.runtime.engine.engine import Engine
from lvlm.runtime.engine.handle import Handle
from lvlm.runtime.generation_options import GenerationOptions, OptionValues


class AsyncHandle:
    """``async for piece in handle`` for the text, ``await handle`` for the answer.

    A task that is cancelled while it waits here cancels the request. For one event loop.
    """

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self._more = asyncio.Event()
        loop = asyncio.get_running_loop()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self._more.set)

        handle.subscribe(tell)

    async def __aiter__(self) -> AsyncIterator[str]:
        read = 0
        while True:
            await self._changed(read)
            text = self.handle.text
            if len(text) > read:
                yield text[read:]
                read = len(text)
            elif self.handle.done:
                self.handle.result()  # raises what went wrong
                return

    def __await__(self) -> Generator[object, None, Generation]:
        return self._answer().__await__()

    def cancel(self) -> bool:
        return self.handle.cancel()

    async def _answer(self) -> Generation:
        while not self.handle.done:
            await self._changed(len(self.handle.text))
        return self.handle.result()

    async def _changed(self, read: int) -> None:
        """Wait until there is more than ``read`` characters, or the end."""
        try:
            while not self.handle.done and len(self.handle.text) <= read:
                self._more.clear()
                if not self.handle.done and len(self.handle.text) <= read:
                    await self._more.wait()
        except asyncio.CancelledError:
            self.handle.cancel()
            raise


def _cancel(submitted: asyncio.Future[Handle]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()


class AsyncEngine:
    """An Engine whose requests are awaited. ``async with`` closes the engine at the end."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def submit(
        self,
        prompt: str,
        images: Images | None = (),
        videos: Videos | None = (),
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        **given: Unpack[OptionValues],
    ) -> AsyncHandle:
        """As Engine.submit; pictures are opened in a thread of their own."""
        submit = partial(
            self.engine.submit, prompt, images, videos, options, timeout=timeout, **given
        )
        submitted = asyncio.get_running_loop().run_in_executor(None, submit)
        try:
            return AsyncHandle(await asyncio.shield(submitted))
        except asyncio.CancelledError:
            submitted.add_done_callback(_cancel)  # nobody will get the handle
            raise

    async def close(self, *, finish: bool = False) -> None:
        await asyncio.to_thread(self.engine.close, finish=finish)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
