"""Form of a model's calls of tools, found out from what its chat template makes of one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lvlm.runtime.prompt.text import Tokenizer
from lvlm.runtime.prompt.tools.tool_calls import ToolCall

Messages = list[dict[str, Any]]
Run = Callable[[Messages, Sequence[Any], bool], str]
"""What a template writes of messages and tools, ready for the answer or not."""

NAME, KEY, VALUE, SAID = "lvlmtool", "lvlmkey", "lvlmvalue", "lvlmsaid"
ARGUMENTS = {KEY: VALUE}
DESCRIPTION = "lvlmdescription"
TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": DESCRIPTION,
        "parameters": {"type": "object", "properties": {KEY: {"type": "string"}}},
    },
}
CALL = ToolCall(NAME, ARGUMENTS, "lvlmcall0").written(str)  # nine letters: Mistral's ids
MAX_CALLS = 16  # of an answer that has to call


@dataclass(frozen=True)
class ToolForm:
    """Calls as JSON objects between two marks, either of which may be nothing.

    start, end  the marks, as a template writes them
    opening     of a call up to its name; ``between`` the name and the arguments, which "}" follows
    arguments   the key of the arguments
    listed      all calls are a list between one pair of marks
    """

    start: str
    end: str
    opening: str
    between: str
    arguments: str
    listed: bool

    def shown(self, tokenizer: Tokenizer) -> ToolForm:
        """The form as answers show it, which leave special tokens out."""

        def visible(text: str) -> str:
            return "".join(piece for piece, id in tokenizer.pieces(text) if id is None)

        return replace(self, start=visible(self.start), end=visible(self.end))


def takes_tools(run: Run) -> bool:
    """True where a template writes what tools there are."""
    try:
        return DESCRIPTION in run([_user()], [TOOL], True)
    except Exception:  # a template can raise whatever its expressions can
        return False


def writes_calls(run: Run) -> bool:
    """True where a template writes the calls of an assistant's message."""
    try:
        text = run([_user(), _assistant("", calls=True)], [TOOL], False)
    except Exception:
        return False
    return VALUE in text


def find_form(run: Run) -> ToolForm | None:
    """The form of a template's calls; None if it writes none, or writes them another way."""
    try:
        return _found(run)
    except Exception:
        return None


def _found(run: Run) -> ToolForm | None:
    called = run([_user(), _assistant(SAID, calls=True)], [TOOL], False)
    said = run([_user(), _assistant(SAID)], [TOOL], False)
    before, there, text = called.rpartition(SAID)
    tail = said.rpartition(SAID)[2]
    if not there:  # where there are calls, it leaves the text out
        called = run([_user(), _assistant("", calls=True)], [TOOL], False)
        before = run([_user()], [TOOL], True)
        if not called.startswith(before):
            return None
        text = called.removeprefix(before)
    if not text.endswith(tail) or (at := text.find(NAME)) < 0:
        return None
    text = text[: len(text) - len(tail)]
    for first in (n for n in range(at) if text[n] in "[{"):
        try:
            value, last = json.JSONDecoder().raw_decode(text, first)
        except ValueError:
            continue
        one = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(one, dict) and one.get("name") == NAME and ARGUMENTS in one.values():
            return _form(text, first, last, one, listed=isinstance(value, list))
    return None


def _form(text: str, first: int, last: int, one: dict[str, Any], listed: bool) -> ToolForm | None:
    (key,) = (key for key, value in one.items() if value == ARGUMENTS)
    name = text.index(NAME, first)
    place = text.find("{", name)
    if json.JSONDecoder().raw_decode(text, place)[0] != ARGUMENTS:
        return None  # the name comes last
    return ToolForm(
        start=text[:first].lstrip(),
        end=text[last:].rstrip(),
        opening=text[first:name].removeprefix("[" if listed else ""),
        between=text[name + len(NAME) : place],
        arguments=key,
        listed=listed,
    )


def _user() -> dict[str, Any]:
    return {"role": "user", "content": "x"}


def _assistant(text: str, calls: bool = False) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return message | {"tool_calls": [CALL]} if calls else message
