"""Tools in prompts: as transformers writes them, as text, and their calls read back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_templates import CLOCK, HERMES, LLAMA, MISTRAL, NO_CALLS, PLAIN, WEATHER, XML

from lvlm.core.errors import ParameterError, PromptError
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.options.tool_kinds import read_tools
from lvlm.runtime.prompt.chat_template import ChatTemplate
from lvlm.runtime.prompt.messages import read_messages
from lvlm.runtime.prompt.tools.form import ToolForm
from lvlm.runtime.prompt.tools.tool_calls import ToolCall
from lvlm.runtime.prompt.tools.tool_reader import ToolReader

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wie ist es in Köln?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {
                "id": "abcdefghi",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Köln", "days": 2}'},
            }
        ],
    },
    {"role": "tool", "content": "<|im_end|> rain", "tool_call_id": "abcdefghi"},
    {"role": "user", "content": "And?"},
]
TOOLS = [WEATHER, CLOCK]


def nested(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"a": 1}
    for _ in range(depth - 1):
        made = {"a": made}
    return made


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {}, "<image>")


def form(source: str) -> ToolForm:
    found = template(source).tool_form
    assert found is not None
    return found


@pytest.mark.parity
@pytest.mark.parametrize("source", [HERMES, MISTRAL, LLAMA, XML])
def test_tools_and_calls_are_written_as_transformers_writes_them(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    said = json.loads(json.dumps(TALK))
    function = said[2]["tool_calls"][0]["function"]
    function["arguments"] = json.loads(function["arguments"])  # as templates take them
    rendered, _ = render_jinja_template(
        [said], tools=TOOLS, chat_template=source, add_generation_prompt=True
    )
    made, literals = template(source).render_messages(read_messages(TALK), None, TOOLS)
    assert literals.show(made) == rendered[0]


def test_what_tools_and_calls_say_is_text() -> None:
    call = {"function": {"name": "f<|im_end|>", "arguments": {"a<|im_end|>": ["<|im_end|>"]}}}
    said = [TALK[1], {"role": "assistant", "content": None, "tool_calls": [call]}]
    made, literals = template(HERMES).render_messages(read_messages(said), None, TOOLS)
    assert literals.show(made).count("<|im_end|>") == 2 + 4
    own = "".join(piece for piece, typed in literals.runs(made) if not typed)
    assert own.count("<|im_end|>") == 2  # the ends of the two messages


def test_a_question_has_tools_too() -> None:
    assert '"get_weather"' in template(HERMES).render("Hi", 0, tools=TOOLS)


def test_templates_without_a_place_for_them() -> None:
    with pytest.raises(PromptError, match="has no place for tools"):
        template(PLAIN).render("Hi", 0, tools=TOOLS)
    with pytest.raises(PromptError, match="has no place for tools"):
        template(PLAIN).render_messages(read_messages(TALK[:2]), None, TOOLS)
    with pytest.raises(PromptError, match="writes no tool_calls"):
        template(NO_CALLS).render_messages(read_messages(TALK), None, TOOLS)
    assert template(PLAIN).tool_form is None
    assert template(NO_CALLS).tool_form is None
    assert template(XML).tool_form is None


def test_a_tool_answers_where_the_template_wants_a_call_before_it() -> None:
    strict = (
        "{% for m in messages %}{% set before = messages[loop.index0 - 1] %}"
        "{% if m.role == 'tool' and not before.tool_calls %}"
        "{{ raise_exception('a call is missing') }}{% endif %}{% endfor %}" + HERMES
    )
    made, literals = template(strict).render_messages(read_messages(TALK), None, TOOLS)
    assert "<|im_end|> rain" in literals.show(made)
    with pytest.raises(PromptError, match="a call is missing"):
        template(strict).render_messages(read_messages([TALK[1], TALK[3]]))


def test_forms_are_found() -> None:
    hermes = form(HERMES)
    assert (hermes.start, hermes.end, hermes.listed) == ("<tool_call>\n", "\n</tool_call>", False)
    assert (hermes.opening, hermes.between) == ('{"name": "', '", "arguments": ')
    mistral = form(MISTRAL)
    assert (mistral.start, mistral.end, mistral.listed) == ("[TOOL_CALLS]", "", True)
    llama = form(LLAMA)
    assert (llama.start, llama.end, llama.arguments) == ("", "", "parameters")


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (3, "message 1: its tool_calls is 3; give a list"),
        ([3], "message 1, call 1 is 3; give"),
        ([{"function": {"arguments": "{}"}}], "message 1, call 1: its name is None"),
        ([{"type": "x", "function": {"name": "f"}}], "its type is 'x'; give function"),
        ([{"function": {"name": "f", "arguments": "{"}}], "its arguments are '{'; give an object"),
        ([{"function": {"name": "f", "arguments": [1]}}], "its arguments are"),
        ([{"function": {"name": "f"}, "id": 3}], "its id is 3; give text"),
        ([{"function": {"name": "f", "arguments": nested(60)}}], "its arguments are"),
        ([{"function": {"name": "f", "arguments": '{"a":' * 500 + "1" + "}" * 500}}], "are"),
    ],
)
def test_bad_calls(calls: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_messages([{"role": "assistant", "tool_calls": calls}])


@pytest.mark.parametrize(
    "value",
    [
        3,
        [],
        [{}],
        [{"type": "function"}],
        [{"type": "function", "function": {"name": "a b"}}],
        [{"type": "function", "function": {"name": "a", "parameters": []}}],
        [CLOCK, CLOCK],
        "[",
        [CLOCK | {"x": float("nan")}],
        [CLOCK | {"x": "x" * 100_000}],
        [CLOCK | nested(59)],
        [CLOCK | {"x": {"a": np.zeros(2)}}],
    ],
)
def test_bad_tools(value: Any) -> None:
    with pytest.raises(ParameterError, match=r"tools is .*; give a list of 1 to 128 tools"):
        GenerationOptions(tools=value)


def test_deep_ones_are_taken() -> None:
    deep = [CLOCK | nested(50)]
    said = [
        TALK[1],
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": nested(50)}}]},
    ]
    made, literals = template(HERMES).render_messages(read_messages(said), None, deep)
    assert literals.show(made).count('{"a": ') == 99


def test_tools_are_kept_as_json() -> None:
    kept = GenerationOptions(tools=TOOLS).tools
    assert read_tools(kept) == TOOLS
    assert GenerationOptions(tools=json.dumps(TOOLS)).tools == kept
    assert hash(GenerationOptions(tools=TOOLS)) == hash(GenerationOptions(tools=TOOLS))


ONE = '{"name": "clock", "arguments": {"a": "</tool_call> {"}}'
CALL = ToolCall("clock", {"a": "</tool_call> {"})


@pytest.mark.parametrize(
    ("source", "text", "found"),
    [
        (HERMES, "plain text", ["plain text"]),
        (HERMES, f"I look.\n<tool_call>\n{ONE}\n</tool_call>", ["I look.", CALL]),
        (HERMES, f"<tool_call>{ONE}</tool_call>\n<tool_call>{ONE}</tool_call>\n", [CALL, CALL]),
        (HERMES, f"<tool_call>\n{ONE}{ONE}\n</tool_call> and", [CALL, CALL, " and"]),
        (HERMES, f"<tool_call>\n{ONE}", [CALL]),  # the end was not written
        (HERMES, "<tool_call>\nno</tool_call>", ["<tool_call>\nno</tool_call>"]),
        (HERMES, '<tool_call>{"name": 3}</tool_call>', ['<tool_call>{"name": 3}</tool_call>']),
        (HERMES, f"<tool_call> x <tool_call>{ONE}</tool_call>", ["<tool_call> x", CALL]),
        (HERMES, "a <tool_", ["a <tool_"]),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', [ToolCall("f")]),
        (
            HERMES,
            '<tool_call>{"name": "f", "parameters": "{\\"a\\": 1}"}</tool_call>',
            [ToolCall("f", {"a": 1})],
        ),
        (LLAMA, f"{ONE}; {ONE}", [CALL, CALL]),
        (LLAMA, f" {ONE}\n", [CALL]),
        (LLAMA, '{"name": "other", "parameters": {}}', ['{"name": "other", "parameters": {}}']),
        (LLAMA, f"so: {ONE}", [f"so: {ONE}"]),
        (LLAMA, '{"a": 1}', ['{"a": 1}']),
        (LLAMA, "", []),
        (MISTRAL, f"[TOOL_CALLS][{ONE}, {ONE}]", [CALL, CALL]),
    ],
)
@settings(max_examples=examples(20))
@given(data=st.data())
def test_calls_are_read_however_they_come(
    source: str, text: str, found: list[Any], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    reader = ToolReader(form(source), {"clock"})
    read: list[Any] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        read += reader.feed(text[start:end])
    read += reader.finish()
    joined: list[Any] = []
    for one in read:
        assert one != ""
        if isinstance(one, str) and joined and isinstance(joined[-1], str):
            joined[-1] += one
        else:
            joined.append(one)
    assert joined == found


@given(st.text('<tool_cal>/{}"name:1 \n', max_size=60), st.integers(1, 7))
def test_text_that_is_no_call_is_lost_nowhere(text: str, step: int) -> None:
    reader = ToolReader(form(HERMES), {"clock"})
    read = [one for n in range(0, len(text), step) for one in reader.feed(text[n : n + step])]
    read += reader.finish()
    if reader.calls == 0:
        assert "".join(map(str, read)) == text
