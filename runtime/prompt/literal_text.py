"""Text of messages on its way through a chat template: still text when it comes out.

While a template runs, every character of a message's text is a character of private use, one for
each. So whatever the template does, what came from a message can be told from what the template
wrote, character by character: a user's ``<|im_end|>`` is never the template's own. Lengths, slices
and concatenation are those of the text. What looks at characters (comparisons, tests, ``strip``,
``split``, ``upper``, ``tojson`` …) is given the text itself, and what it makes of that is hidden
again: so templates write what they would write of the text.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

from lvlm.core.errors import PromptError

_PLANES = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))  # for private use
_MAYBE = re.compile("[\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
_RUN = re.compile(f"{_MAYBE.pattern}+|[^{_MAYBE.pattern[1:]}+")


class Literals:
    """The characters that stand for those of a conversation's texts. ``taken``: all texts, also the
    template's and special tokens, whose own characters of private use stand for none."""

    def __init__(self, taken: Iterable[str]) -> None:
        others = {ord(found) for text in taken for found in _MAYBE.findall(text)}
        self._free = (n for n in chain(*_PLANES) if n not in others)
        self._hidden: dict[int, int] = {}
        self._shown: dict[int, int] = {}

    def hide(self, text: str) -> str:
        """The text in private characters, all of it; those that are hidden already stay.

        Raises PromptError for more than 131,068 different characters, which no writing has.
        """
        for number in set(map(ord, text)) - self._hidden.keys() - self._shown.keys():
            free = next(self._free, None)
            if free is None:
                raise PromptError("the messages have too many different characters; shorten them")
            self._hidden[number], self._shown[free] = free, number
        return text.translate(self._hidden)  # which has none of those that stand for others

    def show(self, text: str) -> str:
        """The text itself."""
        return text.translate(self._shown) if _MAYBE.search(text) else text

    def marks(self, text: str) -> list[bool]:
        """Marks of the characters that came from a message."""
        return [ord(c) in self._shown for c in text]

    def runs(self, text: str) -> list[tuple[str, bool]]:
        """The text itself in pieces, and of each whether it came from messages."""
        found: list[tuple[str, bool]] = []
        for piece in _RUN.findall(text):
            hidden = self._shown.keys() & set(map(ord, piece))
            if not hidden or len(hidden) == len(set(piece)):
                each = [(piece, bool(hidden))]
            else:  # with private characters of the template's own
                marked = zip(piece, self.marks(piece), strict=True)
                groups = groupby(marked, key=itemgetter(1))
                each = [("".join(c for c, _ in group), mark) for mark, group in groups]
            for part, mark in each:
                before = found.pop()[0] if found and found[-1][1] == mark else ""
                found.append((before + self.show(part) if mark else before + part, mark))
        return found

    def like(self, made: str, of: str) -> str:
        """``made`` of the hidden text ``of``: hidden character by character where it is as long,
        else as a whole."""
        if len(made) != len(of):
            return self.hide(made)
        pairs = zip(made, self.marks(of), strict=True)
        return "".join([self.hide(c) if hidden else c for c, hidden in pairs])


_current: ContextVar[Literals | None] = ContextVar("literals", default=None)


@contextmanager
def hiding(literals: Literals) -> Generator[None]:
    """Context in which templates are given texts that these have hidden."""
    token = _current.set(literals)
    try:
        yield
    finally:
        _current.reset(token)


def has_hidden(value: Any) -> bool:
    """True where there is hidden text in it, at any depth."""
    if _current.get() is None:
        return False
    if isinstance(value, str):
        return _MAYBE.search(value) is not None
    if isinstance(value, dict):
        return any(has_hidden(k) or has_hidden(v) for k, v in value.items())
    return isinstance(value, list | tuple) and any(map(has_hidden, value))


def shown(value: Any) -> Any:
    """The value with its texts as they are, for what looks at them and makes no text."""
    literals = _current.get()
    if literals is None or not has_hidden(value):
        return value
    if isinstance(value, str):
        return literals.show(value)
    if isinstance(value, dict):
        return {shown(k): shown(v) for k, v in value.items()}
    each = [shown(one) for one in value]
    return tuple(each) if isinstance(value, tuple) else each


def hidden(value: Any, of: Any = None) -> Any:
    """Value that was made of shown ones, its texts hidden; ``of``: the hidden one that it was made
    of, if that was a text."""
    literals = _current.get()
    if literals is None:
        return value
    if isinstance(value, str):
        plain = str.__str__(value)
        return literals.like(plain, of) if isinstance(of, str) else literals.hide(plain)
    if isinstance(value, dict):
        return {hidden(k): hidden(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [hidden(one) for one in value]
    return value


# Methods of strings, lists and mappings


def called(owner: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A method of ``owner``, where there is hidden text in that or in its arguments."""
    if name in _COPYING:
        return getattr(owner, name)(*args, **kwargs)
    if isinstance(owner, dict):
        known = args and args[0] in owner
        return getattr(owner, name)(*args[:1] if known else shown(list(args[:1])), *args[1:])
    if not isinstance(owner, str):
        return getattr(shown(owner), name)(*map(shown, args))  # count, index
    text, given, named = shown(owner), list(map(shown, args)), shown(dict(kwargs))
    if name == "replace":
        return _replaced(owner, text, *args, **kwargs)
    made = getattr(text, name)(*given, **named)
    if isinstance(made, list | tuple):
        return _pieces(owner, text, name, made, given[0] if given else named.get("sep"))
    if name in _CUTTING:
        left = text.lstrip(*given) if name == "strip" else made
        start = len(text) - len(left) if name in ("lstrip", "removeprefix", "strip") else 0
        return owner[start : start + len(made)]
    return hidden(made, owner)


# They put texts together without a look at them, or give what is there
_COPYING = frozenset(
    ("center", "copy", "format", "format_map", "items", "join", "keys", "ljust", "rjust", "values")
)
_CUTTING = frozenset(("lstrip", "removeprefix", "removesuffix", "rstrip", "strip"))


def _replaced(owner: str, text: str, old: Any, new: Any, count: Any = -1) -> Any:
    old = shown(old)
    if not old or not isinstance(old, str) or not isinstance(new, str):
        return hidden(text.replace(old, shown(new), count))
    made, start = [], 0
    while count != 0 and (at := text.find(old, start)) >= 0:
        made += [owner[start:at], new]
        start, count = at + len(old), count - 1
    return "".join([*made, owner[start:]])


def _pieces(owner: str, text: str, name: str, made: Any, sep: Any) -> Any:
    """The parts of ``owner`` where those ``made`` of its text are in that."""
    found, at, lines = [], 0, text.splitlines(keepends=True)
    for number, piece in enumerate(made):
        if name in ("split", "rsplit") and sep is None:
            at = text.index(piece, at)  # only white space is between
        found.append(owner[at : at + len(piece)])
        between = len(sep) if name in ("split", "rsplit") and sep is not None else 0
        at += len(lines[number]) if name == "splitlines" else len(piece) + between
    return tuple(found) if isinstance(made, tuple) else found


# Filters, operators, output


def filtered(
    name: str,
    function: Callable[..., Any],
    before: Sequence[Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """A filter, where hidden text is among its arguments; ``before``: what Jinja puts first."""
    value = args[0]
    if isinstance(value, str):
        if name == "trim":
            chars = args[1] if len(args) > 1 else kwargs.get("chars")
            return called(value, "strip", [] if chars is None else [chars], {})
        if name == "replace":
            return called(value, "replace", args[1:], kwargs)
        if name == "format":
            return percent(value, kwargs or tuple(args[1:]), operator.mod)
    if name in _LOOKING or (name == "string" and not isinstance(value, str)):
        made = function(*before, *map(shown, args), **shown(dict(kwargs)))
        return hidden(made, value)
    if name == "join" and isinstance(value, list | tuple):
        args = [[written(one) for one in value], *args[1:]]
    return function(*before, *args, **kwargs)


_LOOKING = frozenset(
    (
        *("capitalize", "e", "escape", "filesizeformat", "float", "indent", "int", "lower"),
        *("title", "tojson", "truncate", "upper", "urlencode", "wordcount"),
    )
)


def written(value: Any) -> Any:
    """A value as it is printed: of a list with hidden text in it the whole text, hidden."""
    if isinstance(value, str) or not has_hidden(value):
        return value
    return hidden(str(shown(value)))


def percent(pattern: str, values: Any, made: Callable[[Any, Any], Any]) -> Any:
    """``pattern % values``, where there is hidden text in them."""
    each = values if isinstance(values, tuple) else (values,)
    copies = "%" not in _COPIES.sub("", pattern) and all(isinstance(v, str | int) for v in each)
    if copies and not has_hidden(pattern):
        return made(pattern, values)
    return hidden(made(shown(pattern), shown(values)))


_COPIES = re.compile(r"%%|%s")
