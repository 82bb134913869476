"""What a client may send wrong: a status, OpenAI's form, and the server goes on."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from server_tools import Running, asking

from lvlm.runtime.server import chat_completions, replies

CHAT, TEXT, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


def of(part: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part]}]}


def image(url: Any) -> dict[str, Any]:
    return of({"type": "image_url", "image_url": {"url": url}})


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        (CHAT, {"temperature": -1}, 400, "temperature is -1.0"),
        (CHAT, {"temperature": "1"}, 400, "temperature: give a number"),
        (CHAT, {"temperature": True}, 400, "temperature: give a number"),
        (CHAT, {"top_p": 2}, 400, "top_p is 2.0"),
        (CHAT, {"n": 0}, 400, "n is 0"),
        (CHAT, {"n": 10**9}, 400, "n is 1000000000"),
        (CHAT, {"n": 1.5}, 400, "n: "),
        (CHAT, {"max_tokens": 0}, 400, "max_tokens is 0"),
        (CHAT, {"max_completion_tokens": -3}, 400, "max_completion_tokens is -3"),
        (CHAT, {"min_tokens": -3}, 400, "min_tokens is -3"),
        (CHAT, {"top_logprobs": 3}, 400, "top_logprobs needs logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 99}, 400, "top_logprobs is 99"),
        (CHAT, {"logit_bias": {"x": 1}}, 400, "logit_bias: its keys"),
        (CHAT, {"stop": ["x"] * 65}, 400, "stop has more than 64"),
        (CHAT, {"logit_bias": {"9999999": 1}}, 400, "logit_bias has token 9999999"),
        (CHAT, {"keep": 3}, 400, "keep is 3"),
        (CHAT, {"kv_keep": 0}, 400, "kv_keep is 0"),
        (CHAT, {"model": "other"}, 404, "there is no model 'other'"),
        (CHAT, {"messages": []}, 400, "messages is empty"),
        (CHAT, {"messages": None}, 400, "messages: "),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "message 1: its role"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "message 1"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, 400, "message 1: its content"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, 400, "call 1 is"),
        (CHAT, of("text"), 400, "message 1, part 1"),
        (CHAT, of({"type": "audio"}), 400, "is of type 'audio'"),
        (CHAT, of({"type": "text", "text": "\ud800"}), 400, "not valid Unicode"),
        (CHAT, image(None), 400, "has no URL"),
        (CHAT, image("cat.png"), 400, "cat.png"),
        (CHAT, image("/etc/passwd"), 400, "files are not read"),
        (CHAT, image("file:///etc/passwd"), 400, "files are not read"),
        (CHAT, image("http://169.254.169.254/latest"), 400, "not downloaded"),
        (CHAT, image("data:image/png;base64,aaaa"), 400, "not an image"),
        (CHAT, image("data:image/png;base64," + "A" * 2_000_000), 413, "too large"),
        (CHAT, {"tools": [{"type": "function"}]}, 400, "tools: "),
        (CHAT, {"messages": [{"role": "user", "content": "x " * 9000}]}, 400, "there is room for"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x" * 10**6}]},
            400,
            "1,000,000 characters",
        ),
        (CHAT, of({"type": "text", "text": "x" * 10**6}), 400, "has 1,000,000 characters"),
        (TEXT, {"prompt": ["x", "x" * 10**6]}, 400, "has 1,000,000 characters"),
        (RESPONSE, {"input": "x", "instructions": "x" * 10**6}, 400, "has 1,000,001 characters"),
        (TEXT, {"prompt": []}, 400, "prompt is empty"),
        (TEXT, {"prompt": "x", "echo": True}, 400, "echo is not supported"),
        (TEXT, {"prompt": "x", "best_of": 3}, 400, "best_of is not supported"),
        (TEXT, {"prompt": 3}, 400, "prompt"),
        (RESPONSE, {"input": "x", "previous_response_id": "y"}, 400, "nothing is stored"),
        (RESPONSE, {"input": "x", "n": 2}, 400, "a response has one answer"),
        (RESPONSE, {"input": []}, 400, "messages is empty"),
        (CHAT, {"response_format": {"type": "xml"}}, 400, "response_format.type"),
        (CHAT, {"response_format": {"type": "json_schema"}}, 400, "has no schema"),
        (CHAT, {"stop_token_ids": [""] * 10_001}, 400, "stop_token_ids: it has 10,001 items"),
        (CHAT, {"logit_bias": dict.fromkeys(map(str, range(10_001)), 1)}, 400, "it has 10,001"),
        (TEXT, {"prompt": [1] * 10_001}, 400, "prompt: it has 10,001 items"),
    ],
)
def test_mistakes(path: str, body: dict[str, Any], status: int, says: str, server: Running) -> None:
    given = (HELLO if path == CHAT else {}) | body
    content = json.dumps(given)  # in ASCII: it may name half a surrogate pair
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(server.url + path, content=content, headers=headers, timeout=30)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert says in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    assert (
        "/" not in error["message"].replace("cat.png", "")
        or "data:" in error["message"]
        or ("/docs" in error["message"])
    ), "a path"


def test_images_are_bounded(server: Running) -> None:
    """Before any is read: how many; before any is decoded: of how many pixels."""
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    bomb = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    answer = httpx.post(server.url + CHAT, json=HELLO | image(bomb))
    assert answer.status_code == 400
    assert "too large" in answer.json()["error"]["message"]
    part = {"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}
    many = {"messages": [{"role": "user", "content": [part] * 9}]}
    answer = httpx.post(server.url + CHAT, json=HELLO | many)
    assert answer.status_code == 400
    assert "have 9 images and videos" in answer.json()["error"]["message"]


def test_what_is_no_request(server: Running) -> None:
    for content in (b"", b"{", b"[]", b"\xff\xfe", b"9" * 5000, b'{"messages": ' + b"[" * 5000):
        answer = httpx.post(
            server.url + CHAT, content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400, content[:20]
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert "not served here" not in answer.json()["error"]["message"]
    assert httpx.get(server.url + CHAT).status_code == 405
    assert httpx.post(f"{server.url}/v1/audio").status_code == 404
    assert httpx.post(f"{server.url}/v1/audio").json()["error"]["message"].startswith("POST /v1/au")


def test_a_failure_tells_nothing_of_the_inside(
    server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> Any:
        raise RuntimeError("secret /srv/models")

    monkeypatch.setattr(server.service, "submit", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="tiny", messages=asking("x"))  # type: ignore[arg-type]
    assert "secret" not in caught.value.response.text
    assert "by the request's id" in caught.value.response.text
    assert caught.value.response.headers["x-request-id"]


def test_nor_does_one_in_a_stream_but_the_log(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[dict[str, Any]] = []

    def broken(*_: Any) -> Any:
        raise RuntimeError("secret /srv/models")

    monkeypatch.setattr(chat_completions, "follow", broken)
    monkeypatch.setattr(replies.log, "error", lambda _, **given: logged.append(given))
    headers = {"X-Request-Id": "mine-7"}
    answer = httpx.post(server.url + CHAT, json=HELLO | {"stream": True}, headers=headers)
    assert "by the request's id" in answer.text
    assert "secret" not in answer.text
    (record,) = logged
    assert record["extra"]["fields"]["request_id"] == "mine-7"
    assert isinstance(record["exc_info"], RuntimeError)
    server.settled()
