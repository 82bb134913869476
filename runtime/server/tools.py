"""Tools of a request: what the template is given, how an answer is made to call, and what it calls.

A model that has tools in its chat template writes calls in the form that the template has for them
(prompt/tools/form.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lvlm.core.errors import ParameterError
from lvlm.runtime.options.option_kinds import read_value
from lvlm.runtime.options.structure_kinds import KINDS, LONGEST_TEXT
from lvlm.runtime.options.tool_kinds import TOOLS, read_tools
from lvlm.runtime.prompt.text import Tokenizer
from lvlm.runtime.prompt.tools.forced import calls_grammar
from lvlm.runtime.prompt.tools.form import ToolForm
from lvlm.runtime.prompt.tools.tool_calls import ToolCall
from lvlm.runtime.prompt.tools.tool_reader import ToolReader
from lvlm.runtime.server.answered import new_id
from lvlm.runtime.server.refusals import Refusal

CHOICES = ("auto", "none", "required")


@dataclass(frozen=True)
class ToolSkill:
    """Skill of a model with tools: the form of its calls, None where its template has none."""

    form: ToolForm | None
    tokenizer: Tokenizer


@dataclass(frozen=True)
class AskedTools:
    """Tools of a request. ``several``: more than one call in an answer is taken."""

    tools: Sequence[Mapping[str, Any]]
    form: ToolForm
    tokenizer: Tokenizer
    several: bool = True

    def reader(self) -> AnswerReader:
        """Reader of one answer."""
        names = {tool["function"]["name"] for tool in self.tools}
        return AnswerReader(ToolReader(self.form.shown(self.tokenizer), names), self.several)

    def grammar(self, name: str | None) -> str:
        """Grammar of an answer that has to call: the function of that name, or any of them."""
        wanted = [tool for tool in self.tools if name in (None, tool["function"]["name"])]
        return calls_grammar(self.form, wanted, self.several and name is None, self.tokenizer)


class AnswerReader:
    """Reader of an answer that tells what is said from what calls, in the form of OpenAI's API."""

    def __init__(self, reader: ToolReader, several: bool) -> None:
        self._reader, self._several = reader, several
        self.calls: list[dict[str, Any]] = []

    def read(self, text: str, ended: bool) -> list[str | dict[str, Any]]:
        """Parts that are new, in order; a call when it is complete."""
        found = self._reader.feed(text)
        found += self._reader.finish() if ended else []
        return [told for one in found if (told := self._told(one))]

    def ended(self, reason: str) -> str:
        """The answer's finish_reason, which calls change."""
        return "tool_calls" if self.calls and reason == "stop" else reason

    def _told(self, one: str | ToolCall) -> str | dict[str, Any] | None:
        if isinstance(one, str):
            return one
        if self.calls and not self._several:
            return None
        arguments = json.dumps(one.arguments, ensure_ascii=False)
        function = {"name": one.name, "arguments": arguments}
        call = {"id": new_id("call_"), "type": "function", "function": function}
        self.calls.append(call)
        return call


def add_tools(
    given: dict[str, Any], tools: object, choice: object, several: object, skill: ToolSkill
) -> AskedTools | None:
    """Options of a request with its tools; those that its answers may call. Raises Refusal, and
    ParameterError."""
    name = _wanted(choice)
    if not tools or choice == "none":
        if choice not in (None, *CHOICES[:2]):
            raise _refused("tool_choice asks for a call, but there are no tools", "tool_choice")
        return None
    if skill.form is None:
        raise _refused(
            "tools: this model's chat template has no place for tools, or writes calls in a form "
            "that is not read here; describe them in a system message, or ask for JSON with "
            "response_format",
            "tools",
        )
    text = read_value("tools", TOOLS, tools)
    asked = AskedTools(read_tools(text), skill.form, skill.tokenizer, several is not False)
    given["tools"] = text
    if choice in (None, "auto"):
        return asked
    if name is not None and name not in {tool["function"]["name"] for tool in asked.tools}:
        raise _refused(f"tool_choice: there is no tool {name[:64]!r}", "tool_choice")
    if taken := [kind for kind in KINDS if given.get(kind) is not None]:
        raise _refused(
            f"tool_choice asks for a call, and {taken[0]} for something else; leave one of them "
            'out, or set tool_choice to "auto"',
            "tool_choice",
        )
    given["grammar"] = asked.grammar(name)
    if len(given["grammar"]) > LONGEST_TEXT:
        raise _refused("tools are too long for a call to be asked for; shorten them", "tools")
    return asked


def of_responses(tools: Sequence[Any] | None, choice: object) -> tuple[object, object]:
    """``tools`` and ``tool_choice`` of /v1/responses as those of chat completions, where a
    function's fields are in an object of their own."""

    def inner(one: object) -> object:
        if not isinstance(one, Mapping) or one.get("type") != "function" or "function" in one:
            return one
        fields = {key: value for key, value in one.items() if key not in ("type", "strict")}
        return {"type": "function", "function": fields}

    return tools and [inner(one) for one in tools], inner(choice)


def called_before(items: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Items of /v1/responses' input, with calls and their outputs as messages: calls that follow
    an assistant's message, or one another, belong to one message."""
    made: list[Any] = []
    for one in items:
        kind = one.get("type")
        if kind == "function_call":
            function = {"name": one.get("name"), "arguments": one.get("arguments")}
            call = {"id": one.get("call_id"), "type": "function", "function": function}
            if made and made[-1].get("role") == "assistant":
                before = made.pop()
            else:
                before = {"role": "assistant", "content": None}
            calls = before.get("tool_calls")
            earlier = calls if isinstance(calls, list) else []
            made.append({**before, "tool_calls": [*earlier, call]})
        elif kind == "function_call_output":
            answer = {"role": "tool", "content": one.get("output")}
            made.append(answer | {"tool_call_id": one.get("call_id")})
        else:
            made.append(one)
    return made


def by_its_name(error: ParameterError, asked: AskedTools | None) -> ParameterError:
    """A mistake in parameters of tools, told as theirs: the grammar is not the client's."""
    message = str(error)
    if asked is None or not message.startswith("grammar "):
        return error
    return ParameterError(f"tools: their parameters make a {message.partition(';')[0]}")


def _wanted(choice: object) -> str | None:
    """The function that is asked for by name. Raises Refusal for what is no choice."""
    if choice is None or choice in CHOICES:
        return None
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise _refused(
            'tool_choice is none of auto, none, required and {"type": "function", "function": '
            '{"name": …}}',
            "tool_choice",
        )
    return name


def _refused(message: str, param: str) -> Refusal:
    return Refusal(400, message, param=param)
