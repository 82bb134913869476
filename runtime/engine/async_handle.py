"""Handle of a request for asyncio: nothing here blocks the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Generator
from typing import TYPE_CHECKING

from lvlm.runtime.engine.handle import Handle
from lvlm.runtime.generate.answers import Generation

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11


class AsyncHandle:
    """A request that is awaited: ``async for piece in handle`` for the text, ``await handle`` for
    the answer; ``async with`` cancels it at the end, if it is not done.

    Both raise what Handle.result raises. ``others`` are those of Handle. A task that is cancelled
    while it waits here cancels the request. For one event loop.

    Args:
        handle: the request.
    """

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.others = tuple(AsyncHandle(other) for other in handle.others)
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
                self.handle.check()
                return

    def __await__(self) -> Generator[object, None, Generation]:
        return self._answer().__await__()

    def cancel(self) -> bool:
        """Cancel the request.

        Returns:
            As of Handle.cancel.
        """
        return self.handle.cancel()

    async def wait(self) -> None:
        """Wait until the request has ended, one way or the other, and its ``others``, too."""
        while not self.handle.done:
            await self._changed(len(self.handle.text))
        try:
            for other in self.others:
                await other.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.cancel()

    def __repr__(self) -> str:
        return repr(self.handle).replace("lvlm.Handle", "lvlm.AsyncHandle")

    async def _answer(self) -> Generation:
        await self.wait()
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
