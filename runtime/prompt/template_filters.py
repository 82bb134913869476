"""A template's filters and tests: Jinja's, each paying before it runs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2.runtime import Undefined

from lvlm.runtime.prompt import literal_text
from lvlm.runtime.prompt.template_budget import TemplateCost, budget
from lvlm.runtime.prompt.template_functions import (
    bounded,
    checked,
    pay_percent,
    plain,
    replaced,
    seen,
)


class Given(NamedTuple):
    """Arguments of a filter or test: the value, then its arguments; the value's weight."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    weight: TemplateCost

    def argument(self, at: int, name: str) -> Any:
        return self.args[at] if len(self.args) > at else self.kwargs.get(name)


Pay = Callable[[Given], None]


def filters(known: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Jinja's filters, each paying first. Those that nobody needs here are left out."""
    kept = {name: f for name, f in known.items() if name not in _LEFT_OUT}
    kept["tojson"] = _tojson
    return {
        name: _paying(_literal(name, f), name in _SHALLOW, name in _THROUGH, _FILTERS.get(name))
        for name, f in kept.items()
    }


def tests(known: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    return {name: _paying(_looking(f), name in _SHALLOW_TESTS) for name, f in known.items()}


def _literal(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """With text of messages, hidden, among its arguments it writes what it would of that text."""
    first = _added(function)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if literal_text.has_hidden([args[first:], kwargs]):
            return literal_text.filtered(name, function, args[:first], args[first:], kwargs)
        return function(*args, **kwargs)

    return called


def _looking(function: Callable[..., Any]) -> Callable[..., Any]:
    """A test looks at text of messages as it is."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*map(literal_text.shown, args), **literal_text.shown(kwargs))

    return called


def _added(function: Callable[..., Any]) -> int:
    """Number of arguments that Jinja puts before a filter's own."""
    return 1 if getattr(function, "jinja_pass_arg", None) is not None else 0


def _paying(
    function: Callable[..., Any], shallow: bool, through: bool = False, pay: Pay | None = None
) -> Callable[..., Any]:
    """``shallow``: it looks at the surface of its value; ``through``: it takes every item of it."""
    first = _added(function)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        before, given = args[:first], list(args[first:])
        if shallow:
            budget().work(1 + (len(given[0]) if through and _sized(given[0]) else 0))
        else:
            given = plain(given)
            if through and isinstance(given[0], str):  # it becomes a list of characters
                budget().work(len(given[0]))
            weights = [seen(value) for value in (*given, *kwargs.values())]
            if pay is not None:
                pay(Given(given, kwargs, weights[0]))
        return checked(function(*before, *given, **kwargs))

    return called


def _sized(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, Undefined)


_LEFT_OUT = ("forceescape", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
_ITEMS = frozenset(("list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"))
_THROUGH = _ITEMS | frozenset(
    ("batch", "groupby", "join", "max", "min", "slice", "sort", "sum", "unique")
)
_SHALLOW = _ITEMS | frozenset(
    ("abs", "attr", "count", "d", "default", "first", "float", "items", "last", "length", "safe")
)
_SHALLOW_TESTS = frozenset(
    (
        *("boolean", "callable", "defined", "even", "false", "filter", "float", "integer"),
        *("iterable", "mapping", "none", "number", "odd", "sameas", "sequence", "string"),
        *("test", "true", "undefined"),
    )
)


def _pay_join(given: Given) -> None:
    between = str(given.argument(1, "d") or "")
    budget().make(4 * given.weight.characters + given.weight.nodes * (4 + len(between)))


def _pay_replace(given: Given) -> None:
    old, new = given.argument(1, "old"), given.argument(2, "new")
    budget().make(replaced(str(given.args[0]), str(old), str(new)))


def _pay_indent(given: Given) -> None:
    width, text = given.argument(1, "width"), str(given.args[0])
    many = len(width) if isinstance(width, str) else bounded(width)
    budget().make((len(text.splitlines()) + 2) * many + len(text))


def _pay_width(name: str) -> Pay:
    """The argument of that name, first after the value, is a width or a number of columns."""

    def pay(given: Given) -> None:
        many = bounded(given.argument(1, name))
        budget().make(many)
        budget().work(many)

    return pay


def _pay_format(given: Given) -> None:
    values = given.kwargs or tuple(given.args[1:])
    pay_percent(str(given.args[0]), values, seen(values))


def _pay_sum(given: Given) -> None:
    # Lists are copied again with every one that is added
    items = given.args[0] if isinstance(given.args[0], list | tuple) else ()
    if any(isinstance(item, list | tuple | dict) for item in items):
        budget().work(len(items) * given.weight.nodes)


def _pay_json(given: Given) -> None:
    indent, weight = given.argument(2, "indent"), given.weight
    many = len(indent) if isinstance(indent, str) else bounded(indent, default=0)
    separators = given.argument(3, "separators") or ()
    between = 4 + sum(len(str(s)) for s in separators) + many * (weight.depth + 1)
    budget().make(6 * weight.characters + weight.nodes * between)


def _pay_characters(times: int) -> Pay:
    """Up to so many characters come of one."""
    return lambda given: budget().make(times * (given.weight.characters + given.weight.nodes))


_FILTERS: dict[str, Pay] = {
    "batch": _pay_width("linecount"),
    "center": _pay_width("width"),
    "e": _pay_characters(6),
    "escape": _pay_characters(6),
    "format": _pay_format,
    "indent": _pay_indent,
    "join": _pay_join,
    "replace": _pay_replace,
    "round": _pay_width("precision"),
    "slice": _pay_width("slices"),
    "string": _pay_characters(4),
    "sum": _pay_sum,
    "tojson": _pay_json,
    "urlencode": _pay_characters(12),
}


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
