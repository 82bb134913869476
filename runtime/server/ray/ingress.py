"""The ingress's ASGI application: what is checked once, what it answers itself, and the rest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from prometheus_client.core import Metric
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lvlm.runtime.server.access import Access
from lvlm.runtime.server.app import Limits
from lvlm.runtime.server.metrics import CONTENT_TYPE, Metrics
from lvlm.runtime.server.ray.gathered import text
from lvlm.runtime.server.refusals import RETRY_AFTER


def make_ingress(
    forward: ASGIApp,
    ready: Callable[[], Awaitable[bool]],
    metrics: Callable[[], Awaitable[Mapping[str, Sequence[Metric]]]],
    limits: Limits,
    name: str,
) -> ASGIApp:
    """``forward`` behind keys and limits. ``ready``: whether any replica takes requests;
    ``metrics``: those of replicas, by their ids; ``name``: its own among them."""
    own = Metrics({})

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def is_ready(_: Request) -> Response:
        if await ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "starting"}, 503, {"Retry-After": str(RETRY_AFTER)})

    async def all_metrics(_: Request) -> Response:
        told = {**await metrics(), name: own.families()}
        return Response(text(told), media_type=CONTENT_TYPE)

    routes = [Route("/health", health), Route("/ready", is_ready), Route("/metrics", all_metrics)]
    router = Router(routes, redirect_slashes=False, default=forward)
    app: ASGIApp = Access(
        router,
        keys=limits.keys,
        max_bytes=limits.max_bytes,
        body_seconds=limits.body_seconds,
        refused=lambda status: own.refused("", status),
    )
    if limits.origins:
        app = CORSMiddleware(
            app,
            allow_origins=list(limits.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    return _behind_ray(app)


def _behind_ray(app: ASGIApp) -> ASGIApp:
    """Paths without the prefix of the application's route, and answers without the request's id
    where Ray's proxy adds it."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        async def without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["X-Request-Id"]
            await send(message)

        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        prefix = scope.get("root_path", "")
        path = scope["path"].removeprefix(prefix) or "/"
        named = "x-request-id" in Headers(scope=scope)
        await app({**scope, "path": path, "root_path": ""}, receive, without_id if named else send)

    return serve
