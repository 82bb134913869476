"""Calls of tools: what an assistant's message has besides text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lvlm.core.errors import PromptError, shown
from lvlm.runtime.options.structure_kinds import loaded_json, writes
from lvlm.runtime.options.tool_kinds import too_deep

NAMES = re.compile(r"[\w $.-]*")  # keys that no tokenizer takes for a token of its own


@dataclass(frozen=True)
class ToolCall:
    """A call of the function ``name``; ``id``: what its answer refers to, where there is one."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None

    def written(self, text: Callable[[str], str]) -> dict[str, Any]:
        """The call as templates take it, ``text`` put in place of each of its texts."""
        function = {"name": text(self.name), "arguments": each_text(self.arguments, text)}
        made: dict[str, Any] = {"type": "function", "function": function}
        return made if self.id is None else made | {"id": text(self.id)}


def read_calls(given: object, where: str) -> tuple[ToolCall, ...]:
    """Calls in the form of OpenAI's API. Raises PromptError."""
    if not isinstance(given, list | tuple):
        raise PromptError(f"{where}: its tool_calls is {shown(given)}; give a list of calls")
    return tuple(_call(one, f"{where}, call {n}") for n, one in enumerate(given, 1))


def _call(given: object, where: str) -> ToolCall:
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(function, Mapping):
        raise PromptError(
            f'{where} is {shown(given)}; give {{"type": "function", "function": {{"name": …, '
            '"arguments": …}}'
        )
    if given.get("type", "function") != "function":
        raise PromptError(f"{where}: its type is {shown(given['type'])}; give function")
    name, number = function.get("name"), given.get("id")
    if not isinstance(name, str) or not name or not writes(name):
        raise PromptError(f"{where}: its name is {shown(name)}; give the function's")
    if number is not None and (not isinstance(number, str) or not writes(number)):
        raise PromptError(f"{where}: its id is {shown(number)}; give text (str)")
    arguments = function.get("arguments") or {}
    try:
        if isinstance(arguments, str):
            arguments = loaded_json(arguments)
        if isinstance(arguments, Mapping) and not too_deep(arguments):
            text = json.dumps(dict(arguments), ensure_ascii=False, allow_nan=False)
            if writes(text):
                return ToolCall(str(name), json.loads(text), number)
    except (RecursionError, TypeError, ValueError):
        pass
    raise PromptError(f"{where}: its arguments are {shown(arguments)}; give an object of JSON")


def each_text(value: Any, text: Callable[[str], str]) -> Any:
    """A value of JSON with ``text`` of each text in it. Of keys, which templates look for by their
    names, only of those that could be more than a name."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {
            key if NAMES.fullmatch(key) else text(key): each_text(one, text)
            for key, one in value.items()
        }
    return [each_text(one, text) for one in value] if isinstance(value, list) else value


def all_texts(value: Any) -> list[str]:
    """The texts in a value of JSON, of any depth, keys too."""
    found: list[str] = []
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, Mapping):
            pending += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            pending += one
    return found
