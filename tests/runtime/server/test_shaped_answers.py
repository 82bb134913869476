"""Answers of a shape: JSON by a schema, and vLLM's other kinds."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest
from server_tools import Running, asking

pytest.importorskip("llguidance")

CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"digit": {"enum": [1, 2, 3]}, "sure": {"type": "boolean"}},
    "required": ["digit", "sure"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},  # the small model would fill it with spaces
}


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def test_json_fits_its_schema(client: openai.OpenAI) -> None:
    given: Any = {"model": "tiny", "messages": asking("Read it."), "max_tokens": 60}
    given |= {"temperature": 1.0, "n": 3, "seed": 4, "response_format": form(SCHEMA)}
    answer = client.chat.completions.create(**given)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        data = json.loads(choice.message.content or "")
        assert isinstance(data["sure"], bool)
        assert isinstance(data["digit"], int)
        assert set(data) == {"digit", "sure"}
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**given, stream=True):
        for one in chunk.choices:
            texts[one.index] += one.delta.content or ""
    assert texts == [choice.message.content for choice in answer.choices]


def test_other_kinds(server: Running) -> None:
    def asked(**given: Any) -> str:
        body = {"messages": asking("Read it."), "max_tokens": 40, "structured_outputs": given}
        answer = httpx.post(server.url + CHAT, json=body, timeout=30).json()
        return str(answer["choices"][0]["message"]["content"])

    assert asked(choice=["cat", "dog"]) in ("cat", "dog")
    assert re.fullmatch("[0-9]{3}-[a-c]", asked(regex="[0-9]{3}-[a-c]"))
    assert asked(grammar='start: "a" | "b"') in ("a", "b")
    assert json.loads(asked(json=SCHEMA)).keys() == {"digit", "sure"}


def test_responses_have_a_format(client: openai.OpenAI) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    answer = client.responses.create(
        model="tiny", input="Read it.", max_output_tokens=60, text=text
    )
    assert json.loads(answer.output_text).keys() == {"digit", "sure"}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "maxItems": 9}
    return schema


@pytest.mark.parametrize(
    "given",
    [
        {"response_format": form({"type": "nothing"})},
        {"response_format": form({"enum": ["x" * 1_100_000]})},
        {
            "response_format": form(
                {"allOf": [{"pattern": f"(a|b)*a.{{{n}}}"} for n in range(9, 40)]}
            )
        },
        {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {"grammar": "start: nothing"}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"structured_outputs": {"regex": "a"}, "ignore_eos": True},
    ],
)
def test_what_no_answer_can_have_is_refused(given: dict[str, Any], server: Running) -> None:
    body = {"messages": asking("Read it."), "max_tokens": 4} | given
    answer = httpx.post(server.url + CHAT, json=body, timeout=60)
    assert answer.status_code == 400, answer.text[:300]
    assert len(answer.json()["error"]["message"]) < 1200
    assert httpx.get(f"{server.url}/health").status_code == 200
