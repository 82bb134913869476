"""An ASGI application as a generator: what a replica does for the ingress."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from starlette.types import ASGIApp, Message, Scope

LAST_SECONDS = 10.0  # for an application to end when its client is gone


async def messages(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[list[Message]]:
    """Messages that ``app`` sends, as many at a time as have come. When the generator is closed, or
    the task that reads it is cancelled, the application is told that its client is gone."""
    came: deque[Message] = deque()
    more, gone = asyncio.Event(), asyncio.Event()
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        came.append(message)
        more.set()

    running = asyncio.ensure_future(app(scope, receive, send))
    running.add_done_callback(lambda _: more.set())
    try:
        ended = False
        while not ended:
            await more.wait()
            more.clear()
            ended = running.done()
            if came:
                batch = list(came)
                came.clear()
                yield batch
        running.result()
    finally:
        gone.set()
        if not running.done():
            await asyncio.wait([running], timeout=LAST_SECONDS)
            running.cancel()
