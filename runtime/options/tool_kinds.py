"""The kind of option that describes tools, functions that an answer may call, as what it is kept.

Nothing here needs numpy or a template: whether a model's chat template has a place for tools shows
when a prompt is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lvlm.runtime.options.option_kinds import Option
from lvlm.runtime.options.structure_kinds import loaded_json, writes

LONGEST_TOOLS = 100_000  # characters of JSON
MAX_TOOLS = 128
DEEPEST = 60  # values within one another, in tools and calls
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class ToolsText(str):
    """JSON text of a list of tools that has been read: options are copied, and it may be long."""


def read_tools(text: object) -> list[dict[str, Any]]:
    """Tools as a template takes them, of the option's value as it is kept."""
    return list(json.loads(text)) if isinstance(text, ToolsText) else []


def too_deep(value: object) -> bool:
    """True where values of JSON lie deeper within one another than those of tools may."""
    within = [value]
    for _ in range(DEEPEST):
        inner: list[object] = []
        for one in within:
            if isinstance(one, Mapping):
                inner += one.values()
            elif isinstance(one, list | tuple):
                inner += one
        if not inner:
            return False
        within = inner
    return True


def _tools(value: object) -> ToolsText:
    if isinstance(value, ToolsText):
        return value
    if isinstance(value, str):
        if len(value) > LONGEST_TOOLS:
            raise ValueError
        value = loaded_json(value)
    if not isinstance(value, list | tuple):
        raise TypeError
    if not 0 < len(value) <= MAX_TOOLS or not all(map(_is_tool, value)) or too_deep(value):
        raise ValueError
    if len({tool["function"]["name"] for tool in value}) < len(value):
        raise ValueError
    try:
        text = json.dumps(list(value), ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise ValueError from None
    if len(text) > LONGEST_TOOLS or not writes(text):
        raise ValueError
    return ToolsText(text)


def _is_tool(value: object) -> bool:
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or value.get("type") != "function":  # type: ignore[attr-defined]
        return False
    name = function.get("name")
    described = isinstance(function.get("description", ""), str | None)
    takes = isinstance(function.get("parameters", {}), dict | None)
    return isinstance(name, str) and NAME.fullmatch(name) is not None and described and takes


TOOLS = Option(
    f"a list of 1 to {MAX_TOOLS} tools of different names, or its JSON text of up to "
    f'{LONGEST_TOOLS:,} characters, each as {{"type": "function", "function": {{"name": …, '
    '"description": …, "parameters": a JSON schema}} with a name of 1 to 64 letters, digits, _, . '
    "and -",
    _tools,
    "tools",
    "TOOLS",
    "functions that the answer may call, where the chat template has a place for them: a file of "
    "JSON, or its text",
)
