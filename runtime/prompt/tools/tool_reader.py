"""Calls in an answer's text, read as it comes."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from lvlm.runtime.prompt.tools.form import ToolForm
from lvlm.runtime.prompt.tools.tool_calls import ToolCall

ARGUMENTS = ("arguments", "parameters")  # models use either, whatever their template writes
DECODER = json.JSONDecoder()


class ToolReader:
    """Tells calls from what is said around them, piece by piece.

    ``form`` is that of the model's template, its marks as answers show them, without special
    tokens; ``names`` are those of the tools. What looks like a call and is none stays text. Without
    a mark that begins calls, an answer is calls where all of it is JSON that names these tools.
    """

    def __init__(self, form: ToolForm, names: Collection[str]) -> None:
        self._start, self._end = form.start.strip(), form.end.strip()
        self._keys = (form.arguments, *ARGUMENTS)
        self._names = names
        self._text = ""  # that has come and not been told
        self._ends = 0  # marks of an end that it had when it was last read
        self._began = False  # something was told
        self.calls = 0

    def feed(self, text: str) -> list[str | ToolCall]:
        """Parts that are known to be text or a call now that ``text`` has come."""
        self._text += text
        return self._read(last=False) if text else []

    def finish(self) -> list[str | ToolCall]:
        """Parts that are left at the end of the answer."""
        return self._read(last=True)

    def _read(self, last: bool) -> list[str | ToolCall]:
        found = self._marked(last) if self._start else self._bare(last)
        joined: list[str | ToolCall] = []
        for one in found:
            if isinstance(one, str) and joined and isinstance(joined[-1], str):
                joined[-1] += one
            elif one:
                joined.append(one)
        self._began = self._began or bool(joined)
        return joined

    def _marked(self, last: bool) -> list[str | ToolCall]:
        found: list[str | ToolCall] = []
        while (at := self._text.find(self._start)) >= 0:
            rest = self._text[at + len(self._start) :]
            ends = rest.count(self._end) if self._end else 0
            if not last and ends <= self._ends:  # no more to be seen than the last time
                self._ends = min(ends, self._ends)
                found.append(self._said(at))
                return found
            calls, behind = self._calls(rest, last)
            if calls:
                found += [self._said(at), *calls]
                self.calls += len(calls)
                self._text, self._ends = rest[behind:], 0
            elif last:  # it is no call: text to the next mark
                found.append(self._text[: at + len(self._start)])
                self._text, self._ends = rest, 0
            else:
                self._ends = ends
                found.append(self._said(at))
                return found
        kept = 0 if last else self._held()
        found.append(self._text[: len(self._text) - kept])
        self._text = self._text[len(self._text) - kept :]
        if last and self.calls and not str(found[-1]).strip():
            found.pop()  # white space behind calls
        return found

    def _said(self, at: int) -> str:
        """Text before a mark, which goes on waiting; the space between is no part of it."""
        said = self._text[:at].rstrip()
        self._text = self._text[at:]
        return said

    def _held(self) -> int:
        """Characters at the end that may yet turn out to belong to a mark."""
        text, longest = self._text, min(len(self._text), len(self._start) - 1)
        mark = next((n for n in range(longest, 0, -1) if text.endswith(self._start[:n])), 0)
        before = text[: len(text) - mark]
        return mark + len(before) - len(before.rstrip())

    def _bare(self, last: bool) -> list[str | ToolCall]:
        begun = self._text.lstrip()[:1]
        if not last and not self._began and begun in ("", "{", "["):
            return []
        if last and not self._began and begun:
            calls, behind = self._calls(self._text, last)
            known = all(call.name in self._names for call in calls)
            if calls and known and not self._text[behind:].strip():
                self._text, self.calls = "", len(calls)
                return list(calls)
        text, self._text = self._text, ""
        return [text]

    def _calls(self, text: str, last: bool) -> tuple[list[ToolCall], int]:
        """The calls that a text begins with, and where they and their mark end; none: it begins
        otherwise, or the mark has not come, which it does without at the ``last``."""
        values: list[Any] = []
        at = 0
        while (at := _past_space(text, at, ",;" if values else "")) < len(text):
            try:
                value, at = DECODER.raw_decode(text, at)
            except (ValueError, RecursionError):
                break
            values += value if isinstance(value, list) else [value]
        calls = [self._call(value) for value in values]
        closed = text.startswith(self._end, at)
        if not calls or None in calls or not (closed or last):
            return [], 0
        at += len(self._end) if closed else 0
        return [call for call in calls if call is not None], at

    def _call(self, value: object) -> ToolCall | None:
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(name, str) or not name:
            return None
        given: Any = next((value[key] for key in self._keys if key in value), {})
        try:
            given = json.loads(given) if isinstance(given, str) else given
        except (ValueError, RecursionError):
            return None
        return ToolCall(name, given) if isinstance(given, dict) else None


def _past_space(text: str, at: int, also: str) -> int:
    while at < len(text) and (text[at].isspace() or text[at] in also):
        at += 1
    return at
