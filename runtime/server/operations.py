"""Endpoints where operators and clients ask about the server itself."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from lvlm.core.version import DISTRIBUTION, version
from lvlm.runtime.engine import Engine
from lvlm.runtime.server.metrics import CONTENT_TYPE
from lvlm.runtime.server.refusals import RETRY_AFTER
from lvlm.runtime.server.service import Served, Service

router = APIRouter()


@router.get("/v1/models", summary="The models that are served")
async def models(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    return {"object": "list", "data": [_model(one) for one in service.models.values()]}


@router.get("/v1/models/{name:path}", summary="One of the models")
async def model(request: Request, name: str) -> dict[str, Any]:
    service: Service = request.app.state.service
    return _model(service.find(name))


def _model(served: Served) -> dict[str, Any]:
    engine = served.engine.engine
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": DISTRIBUTION,
        "max_model_len": engine.capacity.max_text_len,
        "max_images": engine.capacity.max_images,
        "recipe": engine.manifest.recipe,
        "family": engine.manifest.family,
        "tools": served.skill.form is not None,
        **_usual_ratios(engine),
    }


def _usual_ratios(engine: Engine) -> dict[str, float | None]:
    """``keep`` and ``kv_keep`` of requests that say nothing of them; None: they take no number."""
    manifest = engine.manifest
    keep = manifest.keep if engine.keep is None else engine.keep
    by_number = manifest.shortenings and all(s.ratio is None for s in manifest.shortenings)
    policy, kv_keep = manifest.cache_policy, engine.kv_keep
    if policy is None or kv_keep is None:
        kv_keep = None if policy is None else policy.budget.keep
    return {
        "keep": keep if by_number and isinstance(keep, float) else None,
        "kv_keep": kv_keep,
    }


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Whether the process lives")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready", summary="Whether requests are taken")
async def ready(request: Request) -> Response:
    service: Service = request.app.state.service
    if service.draining or not service.ready:
        status = "draining" if service.draining else "starting"
        return JSONResponse({"status": status}, 503, {"Retry-After": str(RETRY_AFTER)})
    return JSONResponse({"status": "ready"})


@router.get("/version", summary="What is installed")
async def own_version() -> dict[str, str]:
    return {"version": version(), "name": DISTRIBUTION}


@router.get("/metrics", summary="Metrics for Prometheus")
async def metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)
