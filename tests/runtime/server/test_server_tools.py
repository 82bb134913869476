"""Tools through HTTP: given to the template, called in answers, answered in the next turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_tools import SAMPLES, Running, asking, picture, running
from tool_templates import CLOCK, HERMES, LLAMA, WEATHER

from lvlm.runtime.engine import Engine

pytest.importorskip("llguidance")

CHAT = "/v1/chat/completions"
TOOLS = [WEATHER, CLOCK]
ARGUMENTS = '{"city": "Rome", "days": 3}'
SAID = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'


@pytest.fixture(scope="module")
def tooled(folder: Path) -> Iterator[Running]:
    """A server whose model has a place for tools in its chat template."""
    with running(Engine(folder, slots=3, threads=1), chat_template=HERMES) as found:
        yield found


@pytest.fixture(scope="module")
def asks(tooled: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tooled.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def said(text: str) -> dict[str, Any]:
    """Fields that have an answer say this, whatever its model would say."""
    return {"extra_body": {"structured_outputs": {"choice": [text]}}, "max_tokens": 200}


def body(**given: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": asking("Rome?", SAMPLES[0]), "max_tokens": 200, **given}


def test_a_call_is_told_from_text(asks: openai.OpenAI) -> None:
    given: Any = body(tools=TOOLS) | said(f"I look.\n{SAID}")
    (choice,) = asks.chat.completions.create(**given).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.id.startswith("call_")
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "get_weather",
        json.loads(ARGUMENTS),
    )


def test_calls_are_streamed(asks: openai.OpenAI) -> None:
    given: Any = body(tools=TOOLS, stream=True, logprobs=True, n=2)
    text, calls, reasons, scored = ["", ""], [[], []], ["", ""], [0, 0]
    for chunk in asks.chat.completions.create(**(given | said(f"I look.\n{SAID}\n{SAID}"))):
        for one in chunk.choices:
            text[one.index] += one.delta.content or ""
            calls[one.index] += one.delta.tool_calls or []  # type: ignore[arg-type]
            reasons[one.index] = one.finish_reason or reasons[one.index]
            scored[one.index] += len(one.logprobs.content or []) if one.logprobs else 0
    assert text == ["I look."] * 2
    assert reasons == ["tool_calls"] * 2
    assert scored[0] == scored[1] > 20  # every token, those of calls too
    for told in calls:
        assert [one.index for one in told] == [0, 1]
        assert [one.function.name for one in told] == ["get_weather"] * 2
        assert json.loads(told[1].function.arguments) == json.loads(ARGUMENTS)


def test_one_call_where_several_are_not_wanted(asks: openai.OpenAI) -> None:
    given: Any = body(tools=TOOLS, parallel_tool_calls=False) | said(f"{SAID}\n{SAID}")
    (choice,) = asks.chat.completions.create(**given).choices
    assert len(choice.message.tool_calls or []) == 1
    assert choice.message.content is None


@pytest.mark.parametrize("several", [True, False])
def test_a_call_can_be_asked_for(asks: openai.OpenAI, several: bool) -> None:
    given: Any = {"tools": TOOLS, "temperature": 1.5, "seed": 2, "n": 3}
    given |= {"tool_choice": "required", "parallel_tool_calls": several}
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in asks.chat.completions.create(**body(**given)).choices:
        if choice.finish_reason == "length":  # it went on calling
            assert several
            continue
        assert choice.finish_reason == "tool_calls"
        assert {c.function.name for c in choice.message.tool_calls or []} <= {
            "get_weather",
            "clock",
        }
        assert len(choice.message.tool_calls or []) <= (16 if several else 1)
    given |= {"tool_choice": named}
    for choice in asks.chat.completions.create(**body(**given)).choices:
        (call,) = choice.message.tool_calls or []
        assert call.function.name == "get_weather"
        taken = json.loads(call.function.arguments)
        assert taken.keys() == {"city", "days"}
        assert 1 <= taken["days"] <= 9


def test_the_next_turn_has_the_call_and_its_answer(tooled: Running, asks: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function"}
    call["function"] = {"name": "get_weather", "arguments": ARGUMENTS}  # type: ignore[assignment]
    talk: Any = [
        *asking("Rome?", SAMPLES[0]),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    answer = asks.chat.completions.create(**body(messages=talk, tools=TOOLS, max_tokens=4))
    alone = tooled.engine.generate(
        [
            {"role": "user", "content": [{"type": "image", "image": SAMPLES[0]}, asked]}
            if (asked := {"type": "text", "text": "Rome?"})
            else {},
            *talk[1:],
        ],
        tools=TOOLS,
        chat_template=HERMES,
        max_new_tokens=4,
    )
    assert answer.choices[0].message.content == alone.text
    assert answer.usage
    assert answer.usage.prompt_tokens == alone.stats.prompt_tokens


FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]  # type: ignore[dict-item]


def test_responses_call_tools(asks: openai.OpenAI) -> None:
    given: Any = {"model": "tiny", "input": "Rome?", "tools": FLAT, "max_output_tokens": 200}
    given["extra_body"] = {"structured_outputs": {"choice": [f"I look.\n{SAID}\n{SAID}\nDone."]}}
    answer = asks.responses.create(**given)
    assert [item.type for item in answer.output] == ["message", *["function_call"] * 2, "message"]
    assert answer.status == "completed"
    assert answer.output_text == "I look.\nDone."
    call: Any = answer.output[1]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", json.loads(ARGUMENTS))
    with asks.responses.stream(**given) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    assert kinds.count("response.output_item.done") == 4
    assert kinds.count("response.function_call_arguments.done") == 2
    assert streamed.output_text == answer.output_text
    other: Any = streamed.output[1]
    assert (other.name, other.arguments) == (call.name, call.arguments)
    talk: Any = [
        {"role": "user", "content": "Rome?"},
        *(item.model_dump(exclude_none=True) for item in answer.output[:3]),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
        {
            "type": "function_call_output",
            "call_id": "x",
            "output": [{"type": "input_text", "text": "sun"}],
        },
    ]
    given |= {"input": talk, "max_output_tokens": 2, "extra_body": {}}
    assert asks.responses.create(**given).usage.input_tokens > answer.usage.input_tokens  # type: ignore[union-attr]
    given |= {"tool_choice": {"type": "function", "name": "clock"}, "max_output_tokens": 90}
    (called,) = asks.responses.create(**given).output
    assert (called.type, called.name, called.arguments) == ("function_call", "clock", "{}")  # type: ignore[union-attr]


def test_no_tools_where_none_are_wanted(asks: openai.OpenAI) -> None:
    given: Any = body(tools=TOOLS, tool_choice="none") | said(SAID)
    (choice,) = asks.chat.completions.create(**given).choices
    assert choice.message.content == SAID
    assert choice.message.tool_calls is None
    plain = asks.chat.completions.create(**body(max_tokens=1)).usage
    none = asks.chat.completions.create(**body(tools=TOOLS, tool_choice="none", max_tokens=1)).usage
    assert plain
    assert none
    assert plain.prompt_tokens == none.prompt_tokens  # the template was given none


def test_models_say_whether_they_take_tools(tooled: Running, server: Running) -> None:
    for one, takes in ((tooled, True), (server, False)):
        data = httpx.get(f"{one.url}/v1/models").json()["data"]
        assert [model["tools"] for model in data] == [takes]


def test_a_form_without_marks(folder: Path) -> None:
    told = '{"name": "clock", "parameters": {}}'
    plain = {"messages": [{"role": "user", "content": "Time?"}], "max_tokens": 60}
    with running(Engine(folder, slots=1, threads=1), chat_template=LLAMA) as one:
        for tools, calls in (([CLOCK], 1), ([WEATHER], 0)):
            given = plain | {"tools": tools, "structured_outputs": {"choice": [told]}}
            answer = httpx.post(one.url + CHAT, json=given, timeout=30).json()
            assert len(answer["choices"][0]["message"].get("tool_calls", [])) == calls
        given = plain | {"tools": [CLOCK], "tool_choice": "required"}
        message = httpx.post(one.url + CHAT, json=given, timeout=30).json()["choices"][0]["message"]
        assert message["tool_calls"][0]["function"] == {"name": "clock", "arguments": "{}"}


def changed(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": CLOCK["function"] | function}  # type: ignore[operator]


def deep(depth: int) -> list[Any]:
    made: Any = "x"
    for _ in range(depth):
        made = {"type": "function", "function": {"name": "clock", "arguments": made}}
    return [made]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools is "),
        ({"tools": [changed(name="a b")]}, "tools is "),
        ({"tools": [CLOCK] * 2}, "tools is "),
        ({"tools": [CLOCK], "tool_choice": "any"}, "tool_choice is none of"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function"}}, "tool_choice is none of"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice: there is no tool 'x'",
        ),
        ({"tool_choice": "required"}, "but there are no tools"),
        (
            {
                "tools": [CLOCK],
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "and schema for something else",
        ),
        (
            {
                "tools": [changed(parameters={"properties": {"a": {"type": "nothing"}}})],
                "tool_choice": "required",
            },
            "tools: their parameters make a grammar is not valid",
        ),
        ({"tools": [changed(description="x" * 100_001)]}, "tools is "),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "call 1"),
        ({"messages": [{"role": "assistant", "tool_calls": deep(400)}]}, "call 1"),
        ({"tools": [CLOCK, deep(400)[0]]}, "tools is "),
        ({"tools": [CLOCK], "tool_choice": deep(400)}, "tool_choice is none of"),
    ],
)
def test_mistakes(tooled: Running, given: dict[str, Any], message: str) -> None:
    asked = {"messages": [{"role": "user", "content": "Time?"}], "max_tokens": 5} | given
    answer = httpx.post(tooled.url + CHAT, json=asked, timeout=30)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert "lvlm" not in answer.json()["error"]["message"]


def test_a_picture_is_seen_beside_tools(asks: openai.OpenAI) -> None:
    talk: Any = [{"role": "user", "content": [{"type": "text", "text": "Read it."}, picture()]}]
    with_picture = asks.chat.completions.create(**body(messages=talk, tools=TOOLS, max_tokens=2))
    assert with_picture.usage
    assert with_picture.usage.prompt_tokens > 100
