"""The ASGI application: routes, errors in OpenAI's form, and what is checked around them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from lvlm.core.errors import LvlmError
from lvlm.core.version import version
from lvlm.runtime.server import chat_completions, completions, operations, page, responses
from lvlm.runtime.server.access import Access
from lvlm.runtime.server.answered import compact
from lvlm.runtime.server.refusals import LONGEST, Refusal, misfit, refusal
from lvlm.runtime.server.service import Service

log = logging.getLogger("lvlm.server")


@dataclass(frozen=True)
class Limits:
    """Limits on what a client may send, and on who may. ``origins``: pages of other servers that
    may ask from a browser."""

    keys: Sequence[str] = ()
    max_bytes: int = 64 << 20
    body_seconds: float = 60.0
    origins: Sequence[str] = ()


def make_app(service: Service, limits: Limits | None = None) -> FastAPI:
    """The application. It warms the models up when it has started, and closes them at its end."""
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(service.warm_up())
        yield
        warming.cancel()
        await service.close()

    app = FastAPI(
        title="lvlm",
        version=version(),
        description="Vision-language models, by OpenAI's API.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    for part in (chat_completions, completions, responses, operations, page):
        app.include_router(part.router)
    for kind in (LvlmError, Refusal):
        app.add_exception_handler(kind, _refused)
    app.add_exception_handler(RequestValidationError, _unfit)
    app.add_exception_handler(HTTPException, _no_route)
    # The last that is added is the first that is asked
    app.add_middleware(
        Access,
        keys=limits.keys,
        max_bytes=limits.max_bytes,
        body_seconds=limits.body_seconds,
        refused=lambda status: service.metrics.refused("", status),
    )
    if limits.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(limits.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients add their own: OpenAI's X-Stainless-...
            expose_headers=["X-Request-Id"],
        )
    return app


async def _refused(request: Request, error: Exception) -> Response:
    refused = refusal(error)
    service: Service = request.app.state.service
    service.metrics.refused(getattr(request.state, "model", ""), refused.status)
    if refused.status == 500:
        fields = {"request_id": getattr(request.state, "request_id", "")}
        log.error(str(error), extra={"fields": fields})
    return _response(refused)


async def _unfit(request: Request, error: Exception) -> Response:
    """A body that is no JSON, or whose fields are of another kind."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        refused = Refusal(400, "the body is not JSON; send Content-Type: application/json")
    else:
        refused = misfit(first, "the body")
    return await _refused(request, refused)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path[:LONGEST]
    message = f"{method} {path} is not served here; /docs lists what is"
    if error.status_code == 400:  # FastAPI's, of what json.loads raises besides its own error
        message = "the body cannot be read: it is no UTF-8, too deeply nested, or has huge numbers"
    return await _refused(request, Refusal(error.status_code, message))


def _response(refused: Refusal) -> Response:
    return Response(
        compact(refused.body), refused.status, refused.headers, media_type="application/json"
    )
