"""Server-sent events: a response that is written as it comes, and ends when its client does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lvlm.runtime.server.answered import compact
from lvlm.runtime.server.refusals import GONE, Refusal

DONE = b"data: [DONE]\n\n"
PATIENCE = 60  # seconds that a client may take to read what was sent

T = TypeVar("T")


def event(data: object, name: str | None = None) -> bytes:
    """One event."""
    named = b"" if name is None else b"event: " + name.encode() + b"\n"
    return named + b"data: " + compact(data) + b"\n\n"


class EventStream(Response):
    """A response of ``chunks``. It ends early where the client is gone, or does not read.

    ``left`` is called at the end, also where ``chunks`` was never begun.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes], left: Callable[[], None]):
        self._chunks, self._left = chunks, left
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    def init_headers(self, headers: Any = None) -> None:
        self.body = b""
        super().init_headers(headers)
        # Of a length nobody knows
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait((writing, gone), return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                scope["state"]["gone"] = True  # for the log
        finally:
            for task in (writing, gone):
                task.cancel()
            await asyncio.gather(writing, gone, return_exceptions=True)
            self._left()
        if not writing.cancelled() and (error := writing.exception()) is not None:
            raise error

    async def _write(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            async with aclosing(self._chunks):
                async with asyncio.timeout(PATIENCE):
                    await send(head)
                async for chunk in self._chunks:
                    async with asyncio.timeout(PATIENCE):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                async with asyncio.timeout(PATIENCE):
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (TimeoutError, OSError):
            return  # nobody reads


async def disconnected(receive: Receive) -> None:
    """Until the client is gone; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Callable[[], Awaitable[T]]) -> T:
    """The result of ``work``, which is cancelled where the client is gone. Raises Refusal then."""
    working: asyncio.Future[T] = asyncio.ensure_future(work())
    gone = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refusal(GONE, "the client is gone")
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
