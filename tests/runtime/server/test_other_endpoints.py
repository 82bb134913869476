"""Completions, responses, models, metrics and the pages."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from server_tools import QUESTION, SAMPLES, Running, data_url

TEXTS = ["USER: Why? ASSISTANT:", "Hello"]


def test_texts_go_on_as_they_stand(client: openai.OpenAI, server: Running) -> None:
    given: Any = {"max_new_tokens": 6, "ignore_eos": True, "chat_template": False}
    expected = server.engine.generate(TEXTS, logprobs=1, **given)
    options: Any = {"model": "tiny", "prompt": TEXTS, "max_tokens": 6, "logprobs": 1}
    options["extra_body"] = {"ignore_eos": True}
    answer = client.completions.create(**options)
    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    for choice, one in zip(answer.choices, expected, strict=True):
        assert choice.logprobs is not None
        scores = [score.logprob for score in one.scores]
        assert choice.logprobs.token_logprobs == pytest.approx(scores, rel=1e-3)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == sum(one.stats.prompt_tokens for one in expected)
    found = ["", ""]
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            found[choice.index] += choice.text
    assert found == [one.text for one in expected]


def test_responses(client: openai.OpenAI, server: Running) -> None:
    own = [{"role": "user", "content": [
        {"type": "image", "image": SAMPLES[0]}, {"type": "text", "text": QUESTION}]}]  # fmt: skip
    expected = server.engine.generate(own, system="Be brief.", max_new_tokens=20)
    parts = [
        {"type": "input_image", "image_url": data_url(SAMPLES[0])},
        {"type": "input_text", "text": QUESTION},
    ]
    options: Any = {"model": "tiny", "input": [{"role": "user", "content": parts}]}
    options |= {"instructions": "Be brief.", "max_output_tokens": 20}
    answer = client.responses.create(**options)
    assert answer.output_text == expected.text
    status = "completed" if expected.finish_reason == "stop" else "incomplete"
    assert answer.status == status
    assert answer.usage is not None
    assert answer.usage.input_tokens == expected.stats.prompt_tokens
    type(answer).model_validate(answer.model_dump())  # the client itself does not look
    events = list(client.responses.create(**options, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == (
        expected.text
    )
    assert events[-1].type == f"response.{status}"
    assert events[-1].response.output_text == expected.text
    cut = client.responses.create(model="tiny", input="Why?", max_output_tokens=1,
                                  extra_body={"ignore_eos": True})  # fmt: skip
    assert cut.status == "incomplete"


def test_models(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "lvlm-deploy"


def test_what_operators_ask(server: Running, client: openai.OpenAI) -> None:
    def counted(name: str) -> float:
        text = httpx.get(f"{server.url}/metrics").text
        lines = [line.split() for line in text.splitlines() if line.startswith(name + "{")]
        return sum(float(value) for _, value in lines)

    names = (
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
        "lvlm:image_tokens_total",
        "vllm:inter_token_latency_seconds_count",
    )
    before = [counted(name) for name in names]
    client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Why?"}],
        max_tokens=4,
        extra_body={"ignore_eos": True},
    )
    after = [counted(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [4, 1, 0, 3]
    assert counted("vllm:num_requests_running") == 0
    for path, status in (("/health", "ok"), ("/ready", "ready")):
        assert httpx.get(server.url + path).json() == {"status": status}
    assert httpx.get(f"{server.url}/version").json()["name"] == "lvlm-deploy"


def test_pages_are_whole_and_of_this_server_alone(server: Running) -> None:
    for path in ("/", "/docs", "/page/app.js", "/page/docs.js", "/page/style.css"):
        page = httpx.get(server.url + path)
        assert page.status_code == 200, path
        assert "default-src 'self'" in page.headers["content-security-policy"]
        text = page.text.replace("http://www.w3.org/2000/svg", "")  # a name, not a place
        assert "http:" not in text, path
        assert "https:" not in text, path
    assert httpx.get(f"{server.url}/page/page.py").status_code == 404
    api = httpx.get(f"{server.url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses"} <= set(api["paths"])
    assert json.dumps(api)
