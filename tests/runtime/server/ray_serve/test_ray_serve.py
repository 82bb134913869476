"""What of the Ray Serve application needs no Ray: the ingress, and what a replica does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

import httpx
import pytest
from prometheus_client.core import Metric
from server_tools import QUESTION, SAMPLES, Running, asking
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lvlm.runtime.server.app import Limits, make_app
from lvlm.runtime.server.metrics import Metrics
from lvlm.runtime.server.ray.asgi_calls import messages
from lvlm.runtime.server.ray.forwarding import Forward, ReplicaLost
from lvlm.runtime.server.ray.gathered import text
from lvlm.runtime.server.ray.ingress import make_ingress

CHAT = "/v1/chat/completions"
START = {"type": "http.response.start", "status": 200}
STREAM = START | {"headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
WHOLE = START | {"headers": [(b"content-type", b"application/json"), (b"content-length", b"2")]}
END = {"type": "http.response.body", "body": b"{}", "more_body": False}


async def answering(scope: Scope, receive: Receive, send: Send) -> None:
    assert (await receive())["body"] == b"asked"
    await send(STREAM)
    await send({"type": "http.response.body", "body": b"1", "more_body": True})
    await asyncio.sleep(0.01)
    await send(END)
    assert (await receive())["type"] == "http.disconnect"
    scope["left"].append("told")


def test_messages_come_together_and_a_closed_generator_is_a_client_that_left() -> None:
    async def ask(most: int) -> list[int]:
        left: list[str] = []
        batches: list[int] = []
        made = messages(answering, {"left": left}, b"asked")
        async for batch in made:
            batches.append(len(batch))
            if len(batches) == most:
                break
        await made.aclose()
        assert left == (["told"] if most < 3 else [])
        return batches

    assert asyncio.run(ask(1)) == [2]
    assert asyncio.run(ask(2)) == [2, 1]


def test_what_an_application_raises_is_raised() -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    async def ask() -> None:
        async for _ in messages(broken, {}, b""):
            pass

    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(ask())


class Replicas:
    """Replicas that do one thing after the other: messages are sent, exceptions raised."""

    def __init__(self, *does: Sequence[Any]) -> None:
        self.does, self.avoided, self.closed = list(does), [""][:0], 0
        self.scopes: list[Scope] = []

    async def __call__(
        self, scope: Scope, _: bytes, **routed: str
    ) -> AsyncGenerator[list[Message]]:
        self.avoided.append(routed["avoid"])
        self.scopes.append(scope)
        try:
            for one in self.does.pop(0):
                if isinstance(one, Exception):
                    raise one
                if one == "wait":
                    await asyncio.sleep(60)
                yield [dict(one)]
        finally:
            self.closed += 1


async def nothing() -> dict[str, list[Metric]]:
    return {}


async def yes() -> bool:
    return True


def ingress(
    call: Any,
    limits: Limits | None = None,
    ready: Callable[[], Awaitable[bool]] = yes,
    metrics: Any = nothing,
) -> ASGIApp:
    return make_ingress(Forward(call), ready, metrics, limits or Limits(), "ingress")


def ask(asgi: ASGIApp, method: str, path: str, **given: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path, **given)

    return asyncio.run(send())


def test_a_request_whose_replica_goes_is_asked_again() -> None:
    replicas = Replicas([ReplicaLost("a")], [WHOLE, END])
    answer = ask(ingress(replicas), "POST", CHAT, json={}, headers={"X-Request-Id": "mine"})
    assert (answer.status_code, answer.text) == (200, "{}")
    assert replicas.avoided == ["", "a"]
    assert dict(replicas.scopes[1]["headers"])[b"x-request-id"] == b"mine"


def test_a_second_loss_is_told() -> None:
    replicas = Replicas([ReplicaLost()], [ReplicaLost()], [WHOLE, END])
    answer = ask(ingress(replicas), "POST", CHAT, json={})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "replica_lost"
    assert "retry-after" in answer.headers
    assert len(replicas.avoided) == 2


@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
def test_a_stream_that_was_begun_ends_with_an_error(path: str) -> None:
    piece = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}
    replicas = Replicas([STREAM, piece, ReplicaLost()], [STREAM, END])
    answer = ask(ingress(replicas), "POST", path, json={})
    first, last, nothing = answer.text.split("\n\n")
    assert (answer.status_code, first, nothing) == (200, "data: {}", "")
    told = json.loads(last.rpartition("data: ")[2])
    assert (told if path == "/v1/responses" else told["error"])["code"] == "replica_lost"
    assert last.startswith("event: error\n") == (path == "/v1/responses")
    assert len(replicas.avoided) == 1


def test_a_client_that_leaves_ends_the_call() -> None:
    replicas = Replicas([STREAM, "wait"])

    async def leave() -> None:
        sent = asyncio.Event()
        came = iter([{"type": "http.request", "body": b"{}", "more_body": False}])

        async def receive() -> Message:
            for message in came:
                return message
            await sent.wait()
            return {"type": "http.disconnect"}

        async def send(_: Message) -> None:
            sent.set()

        scope = {"type": "http", "path": CHAT, "method": "POST", "headers": []}
        await ingress(replicas)(scope, receive, send)
        assert replicas.closed == 1

    asyncio.run(leave())


def test_the_ingress_checks_before_replicas_are_asked() -> None:
    asgi = ingress(Replicas(), Limits(keys=["secret"], max_bytes=10))
    assert ask(asgi, "GET", "/health").json() == {"status": "ok"}
    assert ask(asgi, "POST", CHAT, json={}).status_code == 401
    with_key = {"Authorization": "Bearer secret"}
    assert ask(asgi, "POST", CHAT, content=b"x" * 11, headers=with_key).status_code == 413
    assert ask(asgi, "GET", "/metrics").status_code == 401
    told = ask(asgi, "GET", "/metrics", headers=with_key).text
    for status in (401, 413):
        name = f'lvlm:requests_refused_total{{model_name="",replica="ingress",status="{status}"}}'
        assert name in told


def test_it_is_ready_when_a_replica_is() -> None:
    async def no() -> bool:
        return False

    assert ask(ingress(Replicas()), "GET", "/ready").status_code == 200
    answer = ask(ingress(Replicas(), ready=no), "GET", "/ready")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_pages_of_another_origin_may_ask_if_they_are_named() -> None:
    asgi = ingress(Replicas([WHOLE, END]), Limits(origins=["https://a.example"]))
    answer = ask(asgi, "POST", CHAT, json={}, headers={"Origin": "https://a.example"})
    assert answer.headers["access-control-allow-origin"] == "https://a.example"


def test_paths_are_those_below_the_route_of_the_application() -> None:
    replicas = Replicas([WHOLE, END])

    async def below(scope: Scope, receive: Receive, send: Send) -> None:
        await ingress(replicas)({**scope, "root_path": "/tiny"}, receive, send)

    assert ask(below, "GET", "/tiny/health").json() == {"status": "ok"}
    ask(below, "GET", "/tiny/v1/models")
    assert (replicas.scopes[0]["path"], replicas.scopes[0]["root_path"]) == ("/v1/models", "")


def test_nobody_is_talked_to_by_another_protocol() -> None:
    said: list[Message] = []

    async def connect() -> None:
        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            said.append(message)

        await ingress(Replicas())({"type": "websocket", "path": CHAT}, receive, send)

    asyncio.run(connect())
    assert said == [{"type": "websocket.close"}]


def test_metrics_of_replicas_are_told_apart() -> None:
    made = {name: Metrics({}) for name in ("a", "b")}
    made["a"].refused("tiny", 429)
    told = text({name: one.families() for name, one in made.items()}).decode()
    refused = 'lvlm:requests_refused_total{model_name="tiny",replica="a",status="429"} 1.0'
    assert refused in told
    types = [line for line in told.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types)) > 5


def test_answers_are_those_of_the_server(server: Running) -> None:
    """The whole way but for Ray's."""
    replica = make_app(server.service)

    async def call(scope: Scope, body: bytes, **_: str) -> Any:
        async for batch in messages(replica, scope, body):
            yield batch

    asgi = ingress(call)
    asked = {"messages": asking(QUESTION, SAMPLES[0]), "max_tokens": 9}
    for body in (asked, asked | {"top_p": 7}, asked | {"model": "none"}):
        own = httpx.post(server.url + CHAT, json=body)
        answer = ask(asgi, "POST", CHAT, json=body)
        assert answer.status_code == own.status_code
        told, expected = answer.json(), own.json()
        for name in ("choices", "error"):
            assert told.get(name) == expected.get(name)
    streamed = ask(asgi, "POST", CHAT, json=asked | {"stream": True}).text
    assert streamed.endswith("data: [DONE]\n\n")
    assert ask(asgi, "GET", "/page/app.js").status_code == 200
