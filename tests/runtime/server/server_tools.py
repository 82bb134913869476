"""A server in a thread of this process, and what clients ask it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from settings import ASSETS

from lvlm.runtime.engine import Engine
from lvlm.runtime.engine.aio import AsyncEngine
from lvlm.runtime.server.app import Limits, make_app
from lvlm.runtime.server.media.media_reader import MediaReader
from lvlm.runtime.server.media.media_rules import MediaRules
from lvlm.runtime.server.running import Server, configuration, listen
from lvlm.runtime.server.service import Served, Service

SAMPLES = [ASSETS / "samples" / f"digits-{n}.png" for n in (1, 2)]
QUESTION = "What is in the top row?"
LONG = {"max_tokens": 1500, "ignore_eos": True}
PATIENCE = 30.0


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def picture(path: Path = SAMPLES[0]) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(path)}}


def asking(text: str = QUESTION, *images: Path) -> list[dict[str, Any]]:
    parts = [*map(picture, images), {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


@dataclass
class Running:
    """A server that listens at ``url``."""

    url: str
    service: Service
    engine: Engine

    def settled(self) -> None:
        """Wait until nothing is running or waiting."""
        until = time.monotonic() + PATIENCE
        while (now := self.engine.stats()).running or now.waiting:
            assert time.monotonic() < until, now
            time.sleep(0.01)


@contextlib.contextmanager
def running(
    engine: Engine, limits: Limits | None = None, name: str = "tiny", **usual: Any
) -> Iterator[Running]:
    """Serve an engine until the end, which closes it. ``usual``: options of requests that say
    nothing."""
    rules = MediaRules(max_bytes=1 << 20)
    service = Service([Served(name, AsyncEngine(engine), usual)], MediaReader(rules).read)
    place = listen("127.0.0.1", 0)
    server = Server(configuration(make_app(service, limits)), service, drain=5)
    thread = threading.Thread(target=_run, args=(server, place))
    thread.start()
    try:
        until = time.monotonic() + PATIENCE
        while not (server.started and service.ready):
            assert thread.is_alive(), "the server ended"
            assert time.monotonic() < until
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{place.getsockname()[1]}", service, engine)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        place.close()


def _run(server: uvicorn.Server, place: Any) -> None:
    asyncio.run(server.serve([place]))
