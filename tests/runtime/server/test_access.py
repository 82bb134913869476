"""Keys, limits and ids."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_tools import LONG, Running, running

from lvlm.runtime.engine import Engine
from lvlm.runtime.server import running as process
from lvlm.runtime.server.app import Limits
from lvlm.runtime.server.running import JsonLines

KEY = "a-key-of-some-length"
BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Iterator[Running]:
    limits = Limits((KEY, "another"), 100_000, 0.3, ("http://page.example",))
    with running(Engine(folder, slots=1, threads=1), limits) as found:
        yield found


def test_a_key_is_needed(guarded: Running) -> None:
    for path in ("/v1/models", "/metrics", "/nothing"):
        for header in ({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": KEY}):
            answer = httpx.get(guarded.url + path, headers=header)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready", "/version", "/", "/page/app.js", "/docs", "/openapi.json"):
        assert httpx.get(guarded.url + path).status_code == 200, path
    for key in (KEY, "another"):
        client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key)
        assert [one.id for one in client.models.list()] == ["tiny"]
    wrong = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="no", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()


def post(server: Running, **given: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}"} | given.pop("headers", {})
    return httpx.post(f"{server.url}/v1/chat/completions", headers=headers, **given)


def test_bodies_are_bounded(guarded: Running) -> None:
    large = json.dumps(BODY | {"user": "x" * 200_000}).encode()

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(large), 10_000):
            yield large[start : start + 10_000]

    for content in (large, chunks()):  # with its length, and without
        answer = post(guarded, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "too_large"
    assert post(guarded, json=BODY).status_code == 200


def test_slow_clients_are_left(guarded: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that sends its body drop by drop, and one that never ends its head."""
    monkeypatch.setattr(process, "HEAD_SECONDS", 0.3)
    address = ("127.0.0.1", int(guarded.url.rpartition(":")[2]))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.create_connection(address) as slow:
        slow.sendall(head.encode() + b"Content-Length: 50\r\n\r\n{")
        slow.settimeout(20)
        assert b" 408 " in slow.recv(1000)
    with socket.create_connection(address) as slow:
        slow.sendall(head.encode())
        slow.settimeout(20)
        assert slow.recv(1000) == b""  # closed
    assert post(guarded, json=BODY).status_code == 200


def test_an_offer_of_another_protocol_is_not_taken(guarded: Running) -> None:
    """As Java's client makes it with its first request."""
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMA"}
    assert post(guarded, json=BODY, headers=offer).status_code == 200


@pytest.mark.parametrize("piece", [b"a" * 10_000, b"A: b\r\n" * 2_000])
def test_heads_are_bounded(piece: bytes, guarded: Running) -> None:
    address = ("127.0.0.1", int(guarded.url.rpartition(":")[2]))
    began = time.monotonic()
    with socket.create_connection(address) as endless:
        endless.settimeout(20)
        endless.sendall(b"GET /health HTTP/1.1\r\nX: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(10_000):
                endless.sendall(piece)
                time.sleep(0.001)
    assert time.monotonic() - began < process.HEAD_SECONDS


def test_who_reads_nothing_is_left(guarded: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sent would lie here for as long as the client likes."""
    monkeypatch.setattr(process, "PATIENCE", 0.3)
    address = ("127.0.0.1", int(guarded.url.rpartition(":")[2]))
    whole = len(httpx.get(f"{guarded.url}/openapi.json").content)
    count = 1 + (16 << 20) // whole  # more than the system keeps
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(20)
        deaf.connect(address)
        asked = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * count
        with contextlib.suppress(ConnectionError):  # it may be gone before all is sent
            deaf.sendall(asked)
        time.sleep(2)
        read = 0
        with contextlib.suppress(ConnectionError):
            while piece := deaf.recv(1 << 20):
                read += len(piece)
    assert read < count * whole


def test_ids_are_kept_and_made(guarded: Running) -> None:
    given = httpx.get(f"{guarded.url}/health", headers={"X-Request-Id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    for bad in ("x" * 200, "two words"):
        made = httpx.get(f"{guarded.url}/health", headers={"X-Request-Id": bad})
        assert len(made.headers["x-request-id"]) == 32


def test_pages_of_chosen_origins_may_ask(guarded: Running) -> None:
    def asked(origin: str) -> httpx.Headers:
        headers = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            # As OpenAI's client sends from a browser
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
        }
        answer = httpx.options(f"{guarded.url}/v1/chat/completions", headers=headers)
        assert (answer.status_code == 200) == (origin == "http://page.example")
        return answer.headers

    allowed = "access-control-allow-origin"
    assert asked("http://page.example")[allowed] == "http://page.example"
    assert allowed not in asked("http://evil.example")


def test_nobody_may_without_being_asked(server: Running) -> None:
    answer = httpx.get(f"{server.url}/health", headers={"Origin": "http://page.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_a_log_record_is_a_line_of_json() -> None:
    record = logging.LogRecord("lvlm.server", logging.INFO, "", 0, "a\nb", (), None)
    record.fields = {"status": 200}
    data = json.loads(JsonLines().format(record))
    assert data["message"] == "a\nb"
    assert data["status"] == 200
    assert time.strptime(data["time"][:19], "%Y-%m-%dT%H:%M:%S")


def test_the_queue_has_an_end(folder: Path, wait_for: Callable[..., None]) -> None:
    """429 with a time to come back, and those that were taken are answered."""
    with running(Engine(folder, slots=1, threads=1, queue_limit=1)) as small:
        long = BODY | LONG | {"stream": True}
        url = f"{small.url}/v1/chat/completions"
        with httpx.Client(timeout=60) as client, client.stream("POST", url, json=long) as first:
            assert first.status_code == 200
            wait_for(lambda: small.engine.stats().running == 1)
            with client.stream("POST", url, json=long) as second:
                assert second.status_code == 200
                wait_for(lambda: small.engine.stats().waiting == 1)
                refused = client.post(url, json=BODY)
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) > 0
                assert refused.json()["error"]["code"] == "queue_full"
                told = client.get(f"{small.url}/metrics").text
                assert 'requests_refused_total{model_name="tiny",status="429"} 1.0' in told
        wait_for(lambda: not small.engine.stats().running + small.engine.stats().waiting)


def test_events_do_not_wait_for_one_another(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small writes go out at once: with Nagle's algorithm each waits for the one before."""
    found: list[int] = []
    made = process.Connection.connection_made

    def noted(self: process.Connection, transport: Any) -> None:
        made(self, transport)
        own = transport.get_extra_info("socket")
        found.append(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(process.Connection, "connection_made", noted)
    httpx.get(f"{server.url}/health")
    assert len(found) == 1
    assert found[0] != 0
