"""The model of Triton's Python backend, against a small copy of that backend's API."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from server_tools import QUESTION, SAMPLES, asking
from tool_templates import HERMES, WEATHER
from triton_fake import Api, Request, TritonError, TritonModelException, arguments, asks

from lvlm.runtime.engine import Engine
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.server.triton_server.backend import TritonBackend
from lvlm.runtime.server.triton_server.python_api import PythonApi

IMAGE = SAMPLES[0].read_bytes()
SHORT = {"max_tokens": 12, "ignore_eos": True}
SAID = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
)
LONG = {"max_tokens": 1500, "ignore_eos": True}


@pytest.fixture(scope="module")
def api() -> Api:
    return Api()


@pytest.fixture(scope="module")
def repository(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model's folder, with the bundle of most tests."""
    made = tmp_path_factory.mktemp("model")
    (made / "1").mkdir()
    (made / "1/bundle").symlink_to(folder)
    return str(made)


@pytest.fixture(scope="module")
def backend(api: Api, repository: str) -> Iterator[TritonBackend]:
    given = {"slots": "2", "threads": "1", "queue": "3", "media_bytes": "100000"}
    made = TritonBackend(cast(PythonApi, api), arguments(repository, given))
    yield made
    made.close()


@pytest.fixture(scope="module")
def lone(folder: Path) -> Generation:
    """The answer of an engine of its own."""
    with Engine(folder, slots=1, threads=1) as engine:
        return engine.generate(QUESTION, [IMAGE], max_new_tokens=12, ignore_eos=True)


def answer(backend: TritonBackend, request: Request) -> Any:
    """The one response."""
    backend.execute([request])
    (response,) = request.wait()
    return response


def whole(request: Request) -> tuple[str, list[int], str]:
    """Text, tokens and end of a stream."""
    responses = request.wait()
    assert all("usage" in one for one in responses[-1:])
    assert not any("usage" in one for one in responses[:-1])
    assert not any(one["finish_reason"][0] for one in responses[:-1])
    text = b"".join(one["text_output"][0] for one in responses).decode()
    tokens = [token for one in responses for token in one["token_ids"][0]]
    return text, tokens, responses[-1]["finish_reason"][0].decode()


def test_a_whole_answer(backend: TritonBackend, lone: Generation) -> None:
    response = answer(backend, asks(QUESTION, IMAGE, **SHORT))
    assert response["text_output"] == [lone.text.encode()]
    assert response["token_ids"] == [list(lone.token_ids)]
    assert response["finish_reason"] == [lone.finish_reason.encode()]
    (usage,) = response["usage"]
    assert usage["prompt_tokens"] == lone.stats.prompt_tokens
    assert usage["completion_tokens"] == len(lone.token_ids)
    assert usage["prompt_tokens_details"]["image_tokens"] == 144


def test_several_streams_at_once_are_each_as_alone(
    backend: TritonBackend, lone: Generation
) -> None:
    """In one call of execute and in several."""
    first, second, third = (asks(QUESTION, IMAGE, stream=True, **SHORT) for _ in range(3))
    backend.execute([first, second])
    backend.execute([third])
    for request in (first, second, third):
        assert whole(request) == (lone.text, list(lone.token_ids), lone.finish_reason)


@pytest.mark.parametrize(
    "image",
    [
        base64.b64encode(IMAGE),
        base64.encodebytes(IMAGE),  # in lines
        b"data:image/png;base64," + base64.b64encode(IMAGE),
    ],
)
def test_forms_of_an_image(backend: TritonBackend, lone: Generation, image: bytes) -> None:
    response = answer(backend, asks(QUESTION, image, **SHORT))
    assert response["text_output"] == [lone.text.encode()]


def test_messages(backend: TritonBackend, lone: Generation) -> None:
    response = answer(backend, asks(messages=asking(QUESTION, SAMPLES[0]), **SHORT))
    assert response["text_output"] == [lone.text.encode()]


def test_parameters_of_the_request_are_fields_too(backend: TritonBackend) -> None:
    """Those of sampling_parameters come first."""
    given = {"max_tokens": 3, "stream": True, "id": "one"}
    request = asks(QUESTION, IMAGE, given=given)
    backend.execute([request])
    assert len(whole(request)[1]) == 3
    response = answer(backend, asks(QUESTION, IMAGE, given={"max_tokens": 3}, max_tokens=2))
    assert len(response["token_ids"][0]) == 2


def test_a_text_as_it_stands(backend: TritonBackend, folder: Path) -> None:
    prompt = "USER: Hello ASSISTANT:"
    with Engine(folder, slots=1, threads=1) as engine:
        expected = engine.generate(prompt, chat_template=False, max_new_tokens=4)
    response = answer(backend, asks(prompt, chat_template=False, max_tokens=4))
    assert response["token_ids"] == [list(expected.token_ids)]
    assert response["usage"][0]["prompt_tokens"] == expected.stats.prompt_tokens


def test_the_question_before_the_answer(backend: TritonBackend, lone: Generation) -> None:
    response = answer(backend, asks(QUESTION, IMAGE, alone=False, **SHORT))
    assert response["text_output"] == [(QUESTION + lone.text).encode()]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools(repository: str, stream: bool) -> None:
    """With a template that has a place for them; ``choice`` has the answer call."""
    pytest.importorskip("llguidance")
    Path(repository, "1/tools.jinja").write_text(HERMES)
    given = {"slots": "1", "threads": "1", "chat_template": "tools.jinja"}
    backend = TritonBackend(cast(PythonApi, Api()), arguments(repository, given))
    said = f"I look.\n{SAID}"
    fields = {"tools": [WEATHER], "structured_outputs": {"choice": [said]}, "max_tokens": 200}
    messages = [{"role": "user", "content": "Rome?"}]
    called = asks(messages=messages, stream=stream, **fields)
    asked_for = asks(messages=messages, tools=[WEATHER], tool_choice={"type": "function"})
    backend.execute([called, asked_for])
    backend.close()
    responses = called.wait()
    assert b"".join(one["text_output"][0] for one in responses) == b"I look."
    (call,) = (call for one in responses for call in one["tool_calls"][0])
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome", "days": 3}
    assert responses[-1]["finish_reason"] == [b"tool_calls"]
    (refused,) = asked_for.wait()
    assert refused.error is not None
    assert refused.error.message.startswith("tool_choice is none of auto")


def test_several_answers(backend: TritonBackend) -> None:
    """A row each, of a stream, too."""
    fields = {"n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 6, "logprobs": 1}
    fields["ignore_eos"] = True
    response = answer(backend, asks(QUESTION, IMAGE, **fields))
    assert response["finish_reason"] == [b"length"] * 2
    assert [len(row) for row in response["token_ids"]] == [6, 6]
    assert [len(row) for row in response["logprobs"]] == [6, 6]
    assert {len(one["top_logprobs"]) for row in response["logprobs"] for one in row} == {1}
    streamed = asks(QUESTION, IMAGE, stream=True, **fields)
    backend.execute([streamed])
    rows: list[list[int]] = [[], []]
    ends: list[list[bytes]] = [[], []]
    for one in streamed.wait():
        for n in (0, 1):
            rows[n] += [token for token in one["token_ids"][n] if token >= 0]
            ends[n] += filter(None, [one["finish_reason"][n]])
    assert rows == response["token_ids"]
    assert ends == [[b"length"], [b"length"]]


DEEP = b"[" * 100_000
IMAGE_PART = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (asks(), "give one of text_input and messages"),
        (asks("x", messages=[{"role": "user", "content": "x"}]), "give one of text_input and"),
        (asks(b"\xff"), "text_input is no text in UTF-8"),
        (asks("x", top_p=9), "top_p is 9"),
        (asks("x", max_tokens=0), "max_tokens is 0; give 1 or more"),
        (asks("x", temperature="hot"), "temperature: give a number"),
        (asks("x", given={"temperature": "hot"}), "temperature: give a number"),
        (asks("x", n=3), "n is 3, but this engine answers 2 at once"),
        (asks("x", best_of=4), "best_of is not supported"),
        (asks("x", chat_template="{{ 1 }}"), "chat_template: give true or false"),
        (asks("x" * 10_000_000), "the prompt has 10,000,000 characters"),
        (asks("x", given={"stream": "yes"}), "stream is 'yes'; give true or false"),
        (asks("x", stream=True, alone=False), "exclude_input_in_output is false"),
        (asks("x", IMAGE, IMAGE, IMAGE), "there are 3 images, and there is room for 2"),
        (asks("x", b"QUJ"), "image 1 is no valid base64"),
        (asks("x", b"data:image/png;base64,QQ=,"), "no valid base64"),
        (asks("x", b"\x89PNG?"), "5 bytes is not an image"),
        (asks("x", b""), "0 bytes is not an image"),
        (asks("x", IMAGE, bytes(100_001)), "image 2' is too large"),
        (asks(messages=b"{"), "messages is no JSON"),
        (asks(messages=DEEP), "messages is no JSON"),
        (asks(messages={"role": "user"}), "messages: "),
        (asks(messages=[]), "messages is empty"),
        (asks(messages=asking("x"), tools=[WEATHER]), "template has no place for tools"),
        (asks(IMAGE, messages=b"[]"), "text_input"),
        (asks(messages=[{"role": "user", "content": [IMAGE_PART]}]), "not fetched here"),
    ],
)
def test_mistakes_end_with_a_line(backend: TritonBackend, request_: Request, says: str) -> None:
    error = answer(backend, request_).error
    assert says in error.message
    assert len(error.message.splitlines()) == 1
    assert error.code == TritonError.INVALID_ARG


def test_fields_that_are_no_object(backend: TritonBackend) -> None:
    for text in (b"[1]", b"{", b"\xff", b"7"):
        request = asks("x")
        request.inputs = {**request.inputs, **asks(text).inputs}
        request.inputs["sampling_parameters"] = request.inputs["text_input"]  # type: ignore[index]
        error = answer(backend, request).error
        assert error.code == TritonError.INVALID_ARG
        assert error.message.startswith("sampling_parameters is no")


def test_who_cancels_leaves_a_slot(
    backend: TritonBackend, wait_for: Callable[[Callable[[], bool]], None]
) -> None:
    """In the middle of an answer, and in the queue."""
    before = backend.engine.stats()
    requests = [asks(QUESTION, IMAGE, stream=True, **LONG) for _ in range(2)]
    backend.execute(requests)
    for request in requests:
        request.begun()
    waiting = asks(QUESTION, IMAGE, **LONG)
    backend.execute([waiting])
    wait_for(lambda: backend.engine.stats().waiting == 1)
    for request in (*requests, waiting):
        request.sender.cancelled = True
    for request in (*requests, waiting):
        error = request.wait()[-1].error
        assert error is not None
        assert error.code == TritonError.CANCELLED
    wait_for(lambda: backend.engine.stats().running == backend.engine.stats().waiting == 0)
    assert backend.engine.stats().new_tokens - before.new_tokens < 2 * LONG["max_tokens"]


def test_a_full_queue_and_a_time_that_has_passed(
    backend: TritonBackend, wait_for: Callable[[Callable[[], bool]], None]
) -> None:
    requests = [asks(QUESTION, stream=True, **LONG) for _ in range(2)]
    backend.execute(requests)
    for request in requests:
        request.begun()
    error = answer(backend, asks(QUESTION, microseconds=10_000, **LONG)).error
    assert error.code == TritonError.UNAVAILABLE
    wait_for(lambda: backend.engine.stats().waiting == 0)
    crowd = [asks(QUESTION, **LONG) for _ in range(3)]
    backend.execute(crowd)
    wait_for(lambda: backend.engine.stats().waiting == 3)
    error = answer(backend, asks(QUESTION, **LONG)).error
    assert "queue" in error.message
    assert error.code == TritonError.UNAVAILABLE
    for request in (*requests, *crowd):
        request.sender.cancelled = True
    for request in (*requests, *crowd):
        request.wait()
    wait_for(lambda: backend.engine.stats().running == backend.engine.stats().waiting == 0)


def test_a_defect_is_logged_and_not_told(
    backend: TritonBackend, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("/secret/path")

    request = asks("x")
    monkeypatch.setattr(request, "parameters", broken)
    error = answer(backend, request).error
    assert error.code == TritonError.INTERNAL
    assert error.message == "the model failed to answer; the server's log says why"
    assert "/secret/path" in api.Logger.lines[-1]


def test_figures(
    backend: TritonBackend, api: Api, wait_for: Callable[[Callable[[], bool]], None]
) -> None:
    answer(backend, asks(QUESTION, IMAGE, max_tokens=2))
    metrics = api.MetricFamily.metrics
    assert api.MetricFamily.labels == {"model_name": "tiny", "version": "1"}
    wait_for(
        lambda: metrics["vllm:generation_tokens_total"].value == backend.engine.stats().new_tokens
    )
    wait_for(lambda: metrics["vllm:num_requests_running"].value == 0)
    assert metrics["lvlm:image_cache_hits_total"].value > 0


def test_what_was_begun_is_finished_before_it_ends(repository: str) -> None:
    """And without metrics it does without."""
    api = Api()
    api.MetricFamily.off = True
    backend = TritonBackend(
        cast(PythonApi, api), arguments(repository, {"slots": "1", "threads": "1"})
    )
    request = asks(QUESTION, stream=True, max_tokens=40, ignore_eos=True)
    backend.execute([request])
    backend.close()
    assert len(whole(request)[1]) == 40
    assert api.Logger.lines == ["no metrics of lvlm: metrics not supported"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"slots": "many"}, "slots is 'many'; give an integer"),
        ({"slot": "2"}, "did you mean slots"),
        ({"device": "cpuu"}, "did you mean cpu"),
        ({"bundle": "elsewhere"}, "elsewhere does not exist"),
        ({"queue": "0"}, "queue is 0"),
        ({"defaults": "mine"}, "defaults is 'mine'"),
        ({"chat_template": "x.jinja"}, "x.jinja cannot be read"),
        ({"EXECUTION_ENV_PATH": "x", "slots": "0"}, "slots is 0"),
    ],
)
def test_what_config_pbtxt_may_have_wrong(
    repository: str, given: dict[str, str], says: str
) -> None:
    with pytest.raises(TritonModelException) as told:
        TritonBackend(cast(PythonApi, Api()), arguments(repository, given))
    assert says in str(told.value)
    assert len(str(told.value).splitlines()) == 1


def test_a_host_of_triton_needs_no_server_of_ours() -> None:
    code = """
import sys
import lvlm.runtime.server.triton_server.answering, lvlm.runtime.server.triton_server.request_reader
import lvlm.runtime.server.triton_server.backend
print(sorted({"fastapi", "starlette", "uvicorn", "prometheus_client"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
