"""A server that most tests ask, and its client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
openai = pytest.importorskip("openai")

from server_tools import PATIENCE, Running, running  # noqa: E402

from lvlm.runtime.engine import Engine  # noqa: E402


@pytest.fixture(scope="module")
def folder(bundle: Callable[..., Path]) -> Path:
    return bundle("digits-llava", max_images=2)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(Engine(folder, slots=3, threads=1, queue_limit=64)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def wait_for() -> Callable[[Callable[[], bool]], None]:
    """Waits until something is so."""

    def wait(there: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE
        while not there():
            assert time.monotonic() < until
            time.sleep(0.01)

    return wait
