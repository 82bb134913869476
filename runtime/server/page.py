"""The page at /, and the list of what is served at /docs: files of this package, nothing from
elsewhere."""

from __future__ import annotations

from functools import cache
from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

from lvlm.runtime.server.refusals import Refusal

router = APIRouter(include_in_schema=False)
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@cache
def _files() -> dict[str, str]:
    folder = resources.files(__package__) / "static"
    return {file.name: file.read_text("utf-8") for file in folder.iterdir()}


def _file(name: str) -> Response:
    kind = TYPES.get(name.rpartition(".")[2])
    if kind is None or name not in _files():
        raise Refusal(404, "there is no such file")
    return Response(_files()[name], 200, HEADERS, media_type=kind)


@router.get("/")
async def index() -> Response:
    return _file("index.html")


@router.get("/docs")
async def docs() -> Response:
    return _file("docs.html")


@router.get("/page/{name}")
async def part(name: str) -> Response:
    return _file(name)
