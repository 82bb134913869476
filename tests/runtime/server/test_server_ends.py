"""Clients that leave, and a server that does."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_tools import LONG, PATIENCE, QUESTION, SAMPLES, Running, asking
from starlette.types import Message

from lvlm.core.errors import RequestCancelled
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.server.asked import Wanted
from lvlm.runtime.server.chat_completions import ChatReply
from lvlm.runtime.server.events import EventStream
from lvlm.runtime.server.fields import ChatFields

CHAT = "/v1/chat/completions"


def test_a_slot_is_free_when_its_client_is_gone(server: Running) -> None:
    body = {"messages": asking(QUESTION, SAMPLES[0]), "n": 2, "temperature": 1.0} | LONG
    submitted = server.engine.stats().submitted
    before = server.engine.stats().new_tokens
    with pytest.raises(httpx.TimeoutException):
        httpx.post(server.url + CHAT, json=body, timeout=0.2)
    server.settled()
    whole = server.engine.stats().new_tokens
    assert whole - before < LONG["max_tokens"]  # neither of the two went on to its end
    with (
        httpx.Client() as client,
        client.stream("POST", server.url + CHAT, json=body | {"stream": True}) as stream,
    ):
        lines = stream.iter_lines()
        while "content" not in next(lines):
            pass
    server.settled()
    now = server.engine.stats()
    assert now.submitted - submitted == 4
    assert now.new_tokens - whole < LONG["max_tokens"]
    text = httpx.get(f"{server.url}/metrics").text
    assert 'lvlm:requests_refused_total{model_name="tiny",status="499"} 2.0' in text


def test_nor_does_one_go_on_that_was_sent_more_requests(server: Running) -> None:
    """A connection on which the next requests lie already."""
    for stream in (False, True):
        before = server.engine.stats()
        body = json.dumps({"messages": asking(), "stream": stream} | LONG).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as made:
            made.sendall(request * 3)
            while not server.engine.stats().running:
                time.sleep(0.01)
        server.settled()
        now = server.engine.stats()
        assert now.submitted - before.submitted == 1
        assert now.new_tokens - before.new_tokens < 1500, stream


def test_nobody_is_waited_for_before_an_answer_begins(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a structure is compiled, say, or waits for a thread that does."""
    begun, ended = threading.Event(), threading.Event()

    async def slow(*_: Any) -> Any:
        begun.set()
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            ended.set()

    monkeypatch.setattr(server.service, "submit", slow)
    bodies = {CHAT: {"messages": asking()}, "/v1/completions": {"prompt": "x"}}
    for path, body in (bodies | {"/v1/responses": {"input": "x"}}).items():
        begun.clear()
        ended.clear()
        with pytest.raises(httpx.TimeoutException):
            httpx.post(server.url + path, json=body, timeout=0.3)
        assert begun.is_set()
        assert ended.wait(5), path  # long before it would end of itself


def test_a_stream_that_was_never_begun_ends_its_request(server: Running) -> None:
    """Its client left while the answer before it was still to be written."""

    async def leave() -> None:
        served = server.service.models["tiny"]
        handle = (await served.engine.submit("Hello", max_new_tokens=1500, ignore_eos=True)).handle
        body = ChatFields(messages=[])
        reply = ChatReply(server.service, served, body, Wanted([], GenerationOptions()), handle)

        async def gone() -> Message:
            return {"type": "http.disconnect"}

        async def send(_: Message) -> None:
            await asyncio.sleep(PATIENCE)

        response = EventStream(reply.stream(), reply.left)
        await response({"type": "http", "state": {}}, gone, send)
        with pytest.raises(RequestCancelled):
            handle.result(PATIENCE)

    asyncio.run(leave())
    server.settled()


def test_answers_among_clients_of_all_kinds_are_those_of_lone_runs(
    server: Running, stress_steps: int
) -> None:
    """Some leave at once, some in the middle, some send nonsense, some read slowly."""
    chance = random.Random(5)
    prompts = [asking("Why?"), asking(QUESTION, SAMPLES[0]), asking("Read it.", *SAMPLES)]
    bodies = [
        {"messages": messages, "max_tokens": length, "ignore_eos": True}
        for messages in prompts
        for length in (3, 17)
    ]
    expected = [_alone(server, body) for body in bodies]
    answered = 0

    async def one(client: httpx.AsyncClient, limit: asyncio.Semaphore) -> None:
        nonlocal answered
        number, kind = chance.randrange(len(bodies)), chance.randrange(6)
        body, text = bodies[number], ""
        async with limit:
            if kind == 0:
                bad = await client.post(server.url + CHAT, json=body | {"top_p": 9})
                assert bad.status_code == 400
            elif kind == 1:
                with pytest.raises(httpx.TimeoutException):
                    await client.post(server.url + CHAT, json=body | LONG, timeout=0.02)
            elif kind == 2:
                answer = await client.post(server.url + CHAT, json=body)
                assert answer.json()["choices"][0]["message"]["content"] == expected[number]
                answered += 1
            else:
                given = body | {"stream": True}
                async with client.stream("POST", server.url + CHAT, json=given) as stream:
                    async for line in stream.aiter_lines():
                        if kind == 3 and text:
                            return  # in the middle
                        if kind == 4:
                            await asyncio.sleep(0.002)
                        text += _piece(line)
                assert text == expected[number]
                answered += 1

    async def main(count: int) -> None:
        limit = asyncio.Semaphore(32)
        async with httpx.AsyncClient(timeout=PATIENCE) as client, asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(one(client, limit))

    grown = []
    for _ in range(2):
        asyncio.run(main(stress_steps // 2))
        server.settled()
        gc.collect()
        grown.append(_resident())
    assert answered > stress_steps // 5
    if stress_steps >= 1000:
        assert grown[1] - grown[0] < 32 << 20, grown


def _resident() -> int:
    """Bytes of this process, the server's, too."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _alone(server: Running, body: dict[str, Any]) -> str:
    answer = httpx.post(server.url + CHAT, json=body, timeout=PATIENCE).json()
    return str(answer["choices"][0]["message"]["content"])


def _piece(line: str) -> str:
    if not line.startswith("data: {"):
        return ""
    choices = json.loads(line[6:])["choices"]
    return str(choices[0]["delta"].get("content") or "") if choices else ""


@pytest.fixture
def process(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """lvlm-serve in a process of its own, and its address."""
    command = [sys.executable, "-m", "lvlm", "serve", f"one={folder}", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as made:
        try:
            assert made.stderr is not None
            found = re.search(r"one at (http://127.0.0.1:\d+)", made.stderr.readline())
            assert found is not None
            threading.Thread(target=made.stderr.read, daemon=True).start()
            _wait(lambda: httpx.get(f"{found[1]}/ready").status_code == 200)
            yield made, found[1]
        finally:
            made.kill()


def _ask(url: str, answers: list[httpx.Response], **given: Any) -> threading.Thread:
    """Ask from a thread, and wait until the answer is begun."""
    body = {"messages": asking(QUESTION, SAMPLES[0]), "ignore_eos": True} | given

    def ask() -> None:
        answers.append(httpx.post(url + CHAT, json=body, timeout=PATIENCE))

    thread = threading.Thread(target=ask)
    running = len(answers) + 1 if not given.get("beside") else 2
    thread.start()
    _wait(lambda: f'num_requests_running{{model_name="one"}} {running}' in _metrics(url))
    return thread


def test_it_drains_at_sigterm(process: tuple[subprocess.Popen[str], str]) -> None:
    """It is not ready any more, what was begun is answered, and its status is 0."""
    made, url = process
    answers: list[httpx.Response] = []
    thread = _ask(url, answers, max_tokens=900)
    os.kill(made.pid, signal.SIGTERM)
    _wait(lambda: httpx.get(f"{url}/ready").status_code == 503)
    assert httpx.get(f"{url}/health").status_code == 200
    refused = httpx.post(url + CHAT, json={"messages": asking()})
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    thread.join(PATIENCE)
    assert answers[0].json()["usage"]["completion_tokens"] == 900
    assert made.wait(PATIENCE) == 0


def test_a_second_signal_waits_for_nobody(process: tuple[subprocess.Popen[str], str]) -> None:
    """Whoever is not answered is told so, whole answers and streams alike."""
    made, url = process
    whole: list[httpx.Response] = []
    streamed: list[httpx.Response] = []
    threads = [_ask(url, whole, max_tokens=1900)]
    threads.append(_ask(url, streamed, max_tokens=1900, stream=True, beside=True))
    os.kill(made.pid, signal.SIGTERM)
    _wait(lambda: httpx.get(f"{url}/ready").status_code == 503)
    os.kill(made.pid, signal.SIGINT)
    for thread in threads:
        thread.join(PATIENCE)
    assert made.wait(PATIENCE) == 0
    assert whole[0].status_code == 503
    assert whole[0].json()["error"]["code"] == "shutting_down"
    last = streamed[0].text.strip().rpartition("data: ")[2]
    assert json.loads(last)["error"]["code"] == "shutting_down"


def _metrics(url: str) -> str:
    return httpx.get(f"{url}/metrics").text


def _wait(there: Any) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            if there():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < until
        time.sleep(0.02)
