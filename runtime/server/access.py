"""Access control around all that answers: keys, sizes, ids and the log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lvlm.runtime.server.answered import compact
from lvlm.runtime.server.refusals import GONE, Refusal, refusal

log = logging.getLogger("lvlm.server")

# Probes, and pages that a browser gets without a key: they hold nothing, and ask for one
OPEN = ("/health", "/ready", "/version", "/", "/docs", "/openapi.json")
REQUEST: ContextVar[str] = ContextVar("request", default="")  # its id, for the log
ID = re.compile(r"[\x21-\x7e]{1,128}")


class Access:
    """ASGI middleware: each request has an id, which the answer and the log tell; bodies are
    bounded in bytes and in the time they take; where there are keys, a request needs one.

    Keys are compared by their hashes, all of them, so that the time it takes tells nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str],
        max_bytes: int,
        body_seconds: float,
        refused: Callable[[int], None],
    ) -> None:
        """``refused`` is told the status of what ends here."""
        self._app, self._max_bytes, self._seconds, self._refused = (
            app,
            max_bytes,
            body_seconds,
            refused,
        )
        self._keys = [_hash(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, began = Headers(scope=scope), time.perf_counter()
        given = headers.get("x-request-id", "")
        name = given if ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = name
        REQUEST.set(name)
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            self._check(scope["path"], headers)
            body = await self._body(headers, receive)
            await self._app(scope, _replayed(body, receive), answer)
        except Exception as error:
            if not isinstance(error, Refusal):
                log.exception("request failed", extra={"fields": {"request_id": name}})
            if not status:
                refused = refusal(error)
                self._refused(refused.status)
                response = Response(
                    compact(refused.body), refused.status, refused.headers, "application/json"
                )
                await response(scope, receive, answer)
        finally:
            _tell(scope, state, status, time.perf_counter() - began)

    def _check(self, path: str, headers: Headers) -> None:
        """Raises Refusal without a key where one is needed."""
        if not self._keys or path in OPEN or path.startswith("/page/"):
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = _hash(key.strip() if kind.lower() == "bearer" else "")
        found = False
        for own in self._keys:  # no early end
            found |= hmac.compare_digest(given, own)
        if not found:
            raise Refusal(401, "a key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body. Raises Refusal where it is too large, or too slow."""
        too_large = Refusal(
            413, f"the body is larger than {self._max_bytes:,} bytes", code="too_large"
        )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._max_bytes:
            raise too_large
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(499, "the client is gone")
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > self._max_bytes:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except TimeoutError:
            raise Refusal(408, f"the body took more than {self._seconds:g} seconds") from None


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body, then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _tell(scope: Scope, state: dict[str, Any], status: int, seconds: float) -> None:
    fields = {
        "request_id": state["request_id"],
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": GONE if "gone" in state else status or GONE,
        "ms": round(seconds * 1e3, 1),
    }
    if "model" in state:
        fields["model"] = state["model"]
    level = logging.DEBUG if scope["path"] in ("/health", "/ready", "/metrics") else logging.INFO
    log.log(level, "request", extra={"fields": fields})
