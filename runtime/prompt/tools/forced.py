"""The grammar of an answer that has to call tools, for llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lvlm.runtime.prompt.text import Tokenizer
from lvlm.runtime.prompt.tools.form import MAX_CALLS, ToolForm

# As templates write JSON (some models would fill it with spaces)
SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def calls_grammar(
    form: ToolForm, tools: Sequence[Mapping[str, Any]], several: bool, tokenizer: Tokenizer
) -> str:
    """A Lark grammar whose texts are calls of these tools, as a model's template writes them.

    Args:
        form: the template's own marks, special tokens and all.
        tools: at least one, each ``{"type": "function", "function": {…}}``.
        several: up to 16 calls, where the form has a way to write more than one.
        tokenizer: the model's.
    """
    start, end = _mark(form.start, tokenizer), _mark(form.end, tokenizer)
    more = several and bool(form.start)
    if form.listed:
        rest = f'(", " call){{0,{MAX_CALLS - 1}}}' if more else ""
        rules = [f'start: {start} "[" call {rest} "]" {end}', "call: one"]
    else:
        rest = f'("\\n" call){{0,{MAX_CALLS - 1}}}' if more else ""
        rules = [f"start: call {rest}", f"call: {start} one {end}"]
    rules.append("one: " + " | ".join(f"f{n}" for n in range(len(tools))))
    for number, tool in enumerate(tools):
        function = tool["function"]
        head = form.opening + function["name"] + form.between
        rules.append(f"f{number}: {_quoted(head)} a{number} {_quoted('}')}")
        rules.append(f"a{number}: %json {json.dumps(_arguments(function), ensure_ascii=False)}")
    return "\n".join(rules)


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    schema = function.get("parameters")
    schema = {"properties": {}} if schema is None else schema
    known = {"additionalProperties": False} if "properties" in schema else {}
    return {"x-guidance": SPACES, "type": "object", **known, **schema}


def _mark(text: str, tokenizer: Tokenizer) -> str:
    """A mark as a rule's items: special tokens by their ids, all else as text."""
    pieces = tokenizer.pieces(text)
    return " ".join(_quoted(piece) if id is None else f"<[{id}]>" for piece, id in pieces)


def _quoted(text: str) -> str:
    return json.dumps(text)
