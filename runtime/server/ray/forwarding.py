"""From the ingress to a replica and back: one more try, and clients that leave."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from lvlm.runtime.server.events import event, unless_gone
from lvlm.runtime.server.ray.routing_key import routing_key
from lvlm.runtime.server.refusals import GONE, Refusal

log = logging.getLogger("lvlm.server")
TRIES = 2
# Of a scope: what is plain data
KEPT = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "query_string", "root_path"),
    *("headers", "client", "server"),
)


class ReplicaLost(Exception):  # noqa: N818 - of a replica, not of a request
    """The replica that was asked cannot answer; another one may. ``replica``: its id, if known."""

    def __init__(self, replica: str = "") -> None:
        super().__init__(replica)
        self.replica = replica


class ReplicaCall(Protocol):
    """Asks a replica. ``routed``: ``key``, and the replica to ``avoid``, for whoever chooses it.

    Raises ReplicaLost where it goes, before or in the middle of its answer, and Refusal.
    """

    def __call__(
        self, scope: Scope, body: bytes, **routed: str
    ) -> AsyncGenerator[list[Message]]: ...


class Forward:
    """The ASGI application that has replicas answer.

    A request whose replica is lost is asked once more where nothing of its answer was sent; else
    the answer ends with an error.
    """

    def __init__(self, call: ReplicaCall) -> None:
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]  # whole: Access has read it

        async def answer() -> None:
            await self._answer(scope, body, send)

        try:
            await unless_gone(receive, answer)
        except Refusal as refused:
            if refused.status != GONE:
                raise
            scope["state"]["gone"] = True  # for the log; the replica counts it

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        key, asked = routing_key(scope["path"], body), _plain(scope)
        began: Message | None = None
        avoid = ""
        for _ in range(TRIES):
            try:
                async with aclosing(self._call(asked, body, key=key, avoid=avoid)) as batches:
                    async for batch in batches:
                        for message in batch:
                            began = began or message
                            await send(message)
                return
            except ReplicaLost as lost:
                avoid = lost.replica
                fields = {"request_id": scope["state"]["request_id"], "begun": began is not None}
                log.warning("replica lost", extra={"fields": fields})
                if began is not None:
                    break
        refused = Refusal(503, "the replica that answered is gone; ask again", code="replica_lost")
        streamed = began is not None and Headers(raw=began["headers"]).get("content-type", "")
        if not streamed or not streamed.startswith("text/event-stream"):
            raise refused
        last = _last_event(scope["path"], refused)
        await send({"type": "http.response.body", "body": last, "more_body": False})


def _last_event(path: str, refused: Refusal) -> bytes:
    if path != "/v1/responses":
        return event(refused.body)
    told = {"type": "error", "code": refused.code, "message": refused.message, "param": None}
    return event(told, "error")


def _plain(scope: Scope) -> Scope:
    """Part of a scope that can go to another process; the request keeps its id."""
    made = {name: scope[name] for name in KEPT if name in scope}
    made["headers"] = list(made["headers"])
    MutableHeaders(scope=made)["X-Request-Id"] = scope["state"]["request_id"]
    return made
