"""The application in Ray: two replicas with a core each, asked through Ray's proxy."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_tools import LONG, QUESTION, SAMPLES, asking

pytest.importorskip("ray.serve", reason="the extra ray is not installed")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is told to anybody

import ray
from ray import serve

from lvlm.runtime.server.ray import app, deployments
from lvlm.runtime.server.ray.arguments import ENGINE
from lvlm.runtime.server.ray.mistakes import Mistake

pytestmark = pytest.mark.slow
CHAT = "/v1/chat/completions"
NAME = f"lvlm{os.getpid()}"
STARTED = 120.0  # seconds at most for a replica to start
# Of replicas: the ingress has a name with a hyphen
SAMPLE = re.compile(r'^(\w+:\w+)\{.*replica="(\w+)".*\} (\S+)$', re.MULTILINE)
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Ray on this machine, and the address of its proxy."""
    ray.init(
        address="local",
        num_cpus=4,  # not of the machine: what replicas ask for
        include_dashboard=False,
        object_store_memory=128 << 20,
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        serve.start(http_options={"port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def url(cluster: str, folder: Path) -> str:
    given = {"bundle": str(folder), "name": "tiny", "replicas": 2, "slots": 3, "drain": 60}
    serve.run(app(given), name=NAME)
    return cluster


@pytest.fixture(scope="module")
def asked(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def metrics(url: str) -> dict[str, Counter[str]]:
    """Replica -> metric -> value."""
    found: dict[str, Counter[str]] = {}
    for name, replica, value in SAMPLE.findall(httpx.get(f"{url}/metrics", timeout=30).text):
        found.setdefault(replica, Counter())[name] += float(value)  # type: ignore[assignment]
    return found


def busy(url: str) -> Counter[str]:
    """Requests of each replica."""
    return Counter({name: int(m[RUNNING] + m[WAITING]) for name, m in metrics(url).items()})


def until(there: Callable[[], Any], seconds: float = STARTED) -> None:
    last = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < last
        time.sleep(0.05)


def text(client: openai.OpenAI, **body: Any) -> str:
    """The answer's text, streamed or not."""
    answer = client.chat.completions.create(**{"model": "tiny", **body})
    if body.get("stream"):
        return "".join(c.choices[0].delta.content or "" for c in answer if c.choices)
    return str(answer.choices[0].message.content)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"replica": 2}, "did you mean replicas"),
        ({"bundle": "nowhere"}, "nowhere does not exist"),
        ({"api_key": "@missing"}, "api_key @missing: No such file"),
        ({"allow_media_domain": "*"}, "the media domain '*'"),
    ],
)
def test_mistakes_show_before_anything_is_started(
    given: dict[str, Any], says: str, folder: Path
) -> None:
    with pytest.raises(Mistake) as error:
        app({"bundle": str(folder)} | given)
    assert says in error.value.format_message()
    assert len(error.value.format_message().splitlines()) == 1


def test_answers_are_those_of_a_lone_engine(asked: openai.OpenAI, client: openai.OpenAI) -> None:
    for messages in (asking("Why?"), asking(QUESTION, SAMPLES[0]), asking("Read.", *SAMPLES)):
        body = {"messages": messages, "max_tokens": 20, "extra_body": {"ignore_eos": True}}
        expected = text(client, **body)
        assert text(asked, **body) == text(asked, **body, stream=True) == expected
    sampled = {"messages": asking(), "temperature": 1.0, "seed": 7, "max_tokens": 9}
    assert text(asked, **sampled) == text(client, **sampled)


def test_errors_are_those_of_a_server(asked: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        text(asked, model="other", messages=asking())
    with pytest.raises(openai.BadRequestError, match="top_p"):
        text(asked, messages=asking(), top_p=7)
    with pytest.raises(openai.BadRequestError) as error:
        text(asked, messages=asking("word " * 9000))
    assert error.value.code == "context_length_exceeded"
    answer = httpx.get(f"{url}/v1/models", headers={"X-Request-Id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_pages_probes_and_the_list_of_models(url: str) -> None:
    for path in ("/", "/docs", "/page/app.js", "/openapi.json", "/version", "/health", "/ready"):
        assert httpx.get(url + path).status_code == 200, path
    assert [one["id"] for one in httpx.get(f"{url}/v1/models").json()["data"]] == ["tiny"]
    assert len(metrics(url)) == 2


def test_a_slot_is_free_when_its_client_is_gone(url: str) -> None:
    def tokens() -> float:
        return sum(one["vllm:generation_tokens_total"] for one in metrics(url).values())

    before = tokens()
    body = {"messages": asking(QUESTION, SAMPLES[0])} | LONG
    with pytest.raises(httpx.TimeoutException):
        httpx.post(url + CHAT, json=body, timeout=0.3)
    with (
        httpx.Client(timeout=30) as http,
        http.stream("POST", url + CHAT, json=body | {"stream": True}) as stream,
    ):
        lines = stream.iter_lines()
        while '"content":"' not in next(lines):
            pass
    until(lambda: not busy(url).total(), 30)
    assert 0 < tokens() - before < 2 * LONG["max_tokens"]


def test_questions_about_an_image_go_to_one_replica(url: str) -> None:
    def known() -> dict[str, float]:
        return {name: one["lvlm:image_cache_misses_total"] for name, one in metrics(url).items()}

    body = {"messages": asking(QUESTION, SAMPLES[1]), "max_tokens": 1}
    httpx.post(url + CHAT, json=body, timeout=30)
    before = known()
    for number in range(6):
        body["messages"] = asking(f"What is in row {number}?", SAMPLES[1])
        assert httpx.post(url + CHAT, json=body, timeout=30).status_code == 200
    assert known() == before


def engines(name: str) -> list[int]:
    """Processes of an application's engines."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdecimal() else b""
        except OSError:  # it has ended
            continue
        if f"ServeReplica:{name}:Engine".encode() in command:
            found.append(int(entry.name))
    return found


def test_a_replica_that_is_killed_takes_no_other_request_with_it(
    url: str, asked: openai.OpenAI, client: openai.OpenAI
) -> None:
    bodies = [
        {"messages": asking(f"Tell {number}."), "max_tokens": 400, "stream": number % 2 == 0}
        | {"extra_body": {"ignore_eos": True}}
        for number in range(16)
    ]
    with ThreadPoolExecutor(8) as pool:
        expected = list(pool.map(lambda body: text(client, **body), bodies))

    def one(body: dict[str, Any]) -> str | openai.APIError:
        try:
            return text(asked, **body, timeout=60)
        except openai.APIError as error:
            return error

    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [pool.submit(one, body) for body in bodies]
        until(lambda: min(busy(url).values()) > 2, 30)
        before = busy(url)
        os.kill(engines(NAME)[0], signal.SIGKILL)
        got = [answer.result() for answer in answers]
    lost = [n for n, answer in enumerate(got) if isinstance(answer, openai.APIError)]
    for number, answer in enumerate(got):
        if number in lost:
            assert answer.code == "replica_lost", answer  # type: ignore[union-attr]
            assert bodies[number]["stream"]  # the others were asked again
        else:
            assert answer == expected[number]
    (killed,) = before.keys() - metrics(url).keys() or [None]
    until(lambda: len(metrics(url)) == 2)
    killed = killed or (before.keys() - metrics(url).keys()).pop()
    assert len(lost) <= before[killed]
    assert before[killed] > 0
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, bodies)) == expected


def test_a_replica_that_is_stopped_finishes_what_it_began(
    url: str, asked: openai.OpenAI, client: openai.OpenAI, folder: Path
) -> None:
    """As others take its place, with other arguments."""
    body = {"messages": asking("Long?"), "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    expected, before = text(client, **body), metrics(url).keys()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(text, asked, **body, stream=n % 2 == 0) for n in range(4)]
        until(lambda: busy(url).total() == 4, 30)
        given = {"bundle": str(folder), "name": "tiny", "replicas": 2, "slots": 4, "drain": 60}
        serve.run(app(given), name=NAME)
        assert [answer.result() for answer in answers] == [expected] * 4
    until(lambda: len(metrics(url).keys() - before) == 2 and not before & metrics(url).keys())
    assert text(asked, **body) == expected


def test_a_queue_that_is_full_and_a_route_of_its_own(cluster: str, folder: Path) -> None:
    given = {"bundle": str(folder), "slots": 1, "queue": 1, "name": "small", "api_key": "k"}
    serve.run(app(given), name=f"{NAME}full", route_prefix="/small")
    url, headers = f"{cluster}/small", {"Authorization": "Bearer k"}
    assert httpx.post(url + CHAT, json={"messages": asking()}).status_code == 401
    assert httpx.get(f"{url}/health").status_code == 200
    body = {"messages": asking(), "max_tokens": 200, "ignore_eos": True}

    def ask(_: int) -> httpx.Response:
        return httpx.post(url + CHAT, json=body, headers=headers, timeout=60)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses.keys() == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "queue_full"
    assert "retry-after" in refused.headers
    serve.delete(f"{NAME}full")


class Mortal(deployments.Replica):
    """A replica whose engine can be ended."""

    async def die(self) -> str:
        """As it does where a backend fails beyond one request. The replica's id."""
        self._engine.close()
        return self._id


def test_a_replica_whose_engine_died_is_replaced(
    cluster: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(deployments, "Replica", Mortal)
    name, url = f"{NAME}mortal", f"{cluster}/mortal"
    serve.run(app({"bundle": str(folder), "replicas": 2}), name=name, route_prefix="/mortal")
    handle = serve.get_deployment_handle(ENGINE, app_name=name)

    def ask(number: int) -> httpx.Response:
        body = {"messages": asking(f"Tell {number}."), "max_tokens": 3}
        return httpx.post(url + CHAT, json=body, timeout=60)

    first = handle.die.remote().result()
    answers = [ask(number).status_code for number in range(8)]  # half of them were its own
    assert answers == [200] * 8
    until(lambda: len(metrics(url)) == 2 and first not in metrics(url))
    handle.broadcast("die").results()  # both
    answer = ask(0)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")
    serve.delete(f"{NAME}mortal")
