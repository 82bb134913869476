"""Base of replies of every kind: the handles, and how they end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from lvlm.runtime.engine.handle import Handle
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.server.access import REQUEST
from lvlm.runtime.server.answered import new_id, now
from lvlm.runtime.server.following import follow
from lvlm.runtime.server.refusals import GONE, Refusal, refusal
from lvlm.runtime.server.service import Served, Service

log = logging.getLogger("lvlm.server")


class Reply:
    """The answers to one request, on their way. ``prefix``: of its id."""

    def __init__(
        self, service: Service, served: Served, handles: Sequence[Handle], prefix: str
    ) -> None:
        self._service, self._served, self._handles = service, served, handles
        self._id, self._created = new_id(prefix), now()
        self._started = False  # to be streamed

    async def _answers(self) -> list[Generation]:
        """All of them, when they are there."""
        async with aclosing(follow(self._handles)) as steps:
            async for _ in steps:
                pass
        return self._ended()

    def _ended(self) -> list[Generation]:
        """Those that are there, counted."""
        answers = [handle.own_result() for handle in self._handles]
        for handle, answer in zip(self._handles, answers, strict=True):
            self._service.metrics.answered(self._served.name, handle, answer)
        return answers

    async def _told(
        self, chunks: AsyncGenerator[bytes], told: Callable[[Refusal], bytes]
    ) -> AsyncGenerator[bytes]:
        """``chunks``; what goes wrong on the way is one more, as it is ``told``."""
        self._started = True
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk
        except (GeneratorExit, asyncio.CancelledError):
            self._service.metrics.refused(self._served.name, GONE)
            raise
        except Exception as error:
            refused = refusal(error)
            self._service.metrics.refused(self._served.name, refused.status)
            if refused.status == 500:
                fields = {"request_id": REQUEST.get(), "model": self._served.name}
                log.error("answer failed", exc_info=error, extra={"fields": fields})
            yield told(refused)

    def left(self) -> None:
        """The stream is over, which its client may have left before anything was written."""
        for handle in self._handles:
            handle.cancel()
        if not self._started:
            self._service.metrics.refused(self._served.name, GONE)

    def _head(self, kind: str) -> dict[str, Any]:
        named = {"id": self._id, "object": kind, "created": self._created}
        return named | {"model": self._served.name}
