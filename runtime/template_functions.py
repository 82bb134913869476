"""What operators, calls, filters and tests of a template cost: paid before they run."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import BuiltinMethodType, GeneratorType, MethodType
from typing import Any, NamedTuple

from jinja2 import Environment
from jinja2.runtime import Undefined
from jinja2.sandbox import SandboxedFormatter

from lvlm.runtime.template_budget import BITS, TemplateLimitError, Weight, budget

WIDTH = 10_000  # of a format, an indentation, a padding; numbers of columns and rows
_CONVERSION = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?")
_NESTED_KEY = re.compile(r"%\([^)]*\(")
_NUMBERS = re.compile(r"\d+")


def pay_operator(operator: str, left: Any, right: Any) -> None:
    _seen(left)
    given = _seen(right)
    numbers = isinstance(left, int) and isinstance(right, int)
    if operator == "*" and not numbers:  # the larger of two numbers is weighed when it is made
        for value, times in ((left, right), (right, left)):
            if isinstance(times, int):
                _make(value, max(times, 0))
    elif operator == "+" and not numbers:
        _make(left, 1)
        _make(right, 1)
    elif operator == "**" and numbers:
        if left.bit_length() * max(right, 0) > BITS:
            raise TemplateLimitError("it makes a number too large")
    elif operator == "%" and isinstance(left, str):
        _pay_percent(left, right, given)


def _make(value: Any, times: int) -> None:
    """``times`` copies of a string's characters, or of a list's items."""
    if isinstance(value, str | bytes):
        budget().make(len(value) * times)
    elif isinstance(value, list | tuple):
        budget().work(len(value) * times)


def _pay_percent(pattern: str, values: Any, weight: Weight) -> None:
    conversions = widths = 0
    if _NESTED_KEY.search(pattern):
        raise TemplateLimitError("it formats a name with parentheses in it")
    for width, precision in _CONVERSION.findall(pattern):
        for number in (width, precision):
            if number == "*" or len(number) > 5 or int(number or 0) > WIDTH:
                raise TemplateLimitError("it formats too widely")
            widths += int(number or 0)
        conversions += 1
    # A mapping's values may all be asked for many times
    times = max(conversions, 1) if isinstance(values, Mapping) else 1
    budget().make(len(pattern) + widths + times * weight.characters)
    budget().work(times * weight.nodes)


def checked(value: Any) -> Any:
    """What was made, within bounds for the next one who takes it."""
    if isinstance(value, int):
        budget().weigh(value)
    elif isinstance(value, str):
        budget().make(len(value))
    elif isinstance(value, list | tuple | dict):
        budget().work(len(value))
    elif isinstance(value, Iterator):
        return _counted(value)
    return value


def _counted(values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
        budget().work()
        yield value


def printed(value: Any) -> Any:
    """A value whose text is about to be made."""
    if isinstance(value, str):
        budget().make(len(value))
    else:
        weight = _seen(value)
        budget().make(4 * weight.nodes + 4 * weight.characters)  # quotes, commas, escapes
    return value


def _seen(value: Any) -> Weight:
    return budget().weigh(value)


# Calls


def pay_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """A function, macro or method of a string, list or mapping."""
    budget().work()
    weights = [_seen(value) for value in (*args, *kwargs.values())]
    owner = function.__self__ if isinstance(function, _METHODS) else None
    if isinstance(owner, str):
        given = Weight(*map(sum, zip(*weights, strict=True))) if weights else Weight(0, 0, 0)
        _pay_method(owner, function.__name__, args, given)
    elif isinstance(owner, list | tuple | dict):
        _seen(owner)  # searched, or copied


_METHODS = (BuiltinMethodType, MethodType)


def _pay_method(text: str, name: str, args: Sequence[Any], given: Weight) -> None:
    pay = budget()
    pay.work(1 + len(text) // 64)
    if name in ("center", "ljust", "rjust", "zfill"):
        pay.make(_size(args))
    elif name == "expandtabs":
        pay.make(text.count("\t") * _size(args))
    elif name == "replace" and len(args) > 1 and isinstance(args[0], str):
        pay.make(_replaced(text, args[0], str(args[1])))
    elif name == "join":
        pay.make(given.characters + given.nodes * len(text))
    elif name in ("split", "rsplit"):
        by = args[0] if args and isinstance(args[0], str) and args[0] else None
        pay.work(text.count(by) if by else len(text) // 2)
    elif name == "splitlines":
        pay.work(sum(text.count(end) for end in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"))


def _replaced(text: str, old: str, new: str) -> int:
    return len(text) + len(new) * (text.count(old) if old else len(text) + 1)


def _size(args: Sequence[Any], at: int = 0, default: int = 8) -> int:
    """A width or a number of columns among the arguments."""
    value = args[at] if len(args) > at else default
    if isinstance(value, int) and abs(value) > WIDTH:
        raise TemplateLimitError(f"it asks for a width of more than {WIDTH}")
    return abs(value) if isinstance(value, int) else default


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        if any(len(n) > 5 or int(n) > WIDTH for n in _NUMBERS.findall(format_spec)):
            raise TemplateLimitError("it formats too widely")
        printed(value)
        return checked(super().format_field(value, format_spec))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        printed(value)
        return super().convert_field(value, conversion)


def bounded_format(environment: Environment, method: Any) -> Callable[..., str]:
    """``format`` or ``format_map`` of a string."""
    text, by_mapping = str(method.__self__), method.__name__ == "format_map"

    def made(*args: Any, **kwargs: Any) -> str:
        if by_mapping:
            (kwargs,), args = args, ()
        budget().make(len(text))
        return str(_Formatter(environment).vformat(text, args, kwargs))

    return made


# Filters and tests


class Given(NamedTuple):
    """What a filter or test is called with: the value, then its arguments; the value's weight."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    weight: Weight

    def argument(self, at: int, name: str) -> Any:
        return self.args[at] if len(self.args) > at else self.kwargs.get(name)


Pay = Callable[[Given], None]


def filters(known: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Jinja's filters, each paying first. Those that nobody needs here are left out."""
    kept = {name: f for name, f in known.items() if name not in _LEFT_OUT}
    kept["tojson"] = _tojson
    return {
        name: _paying(f, name in _SHALLOW, name in _THROUGH, _FILTERS.get(name))
        for name, f in kept.items()
    }


def tests(known: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    return {name: _paying(f, name in _SHALLOW_TESTS) for name, f in known.items()}


def _paying(
    function: Callable[..., Any], shallow: bool, through: bool = False, pay: Pay | None = None
) -> Callable[..., Any]:
    """``shallow``: it looks at the surface of its value, or (``through``) of every item in it."""
    first = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        before, given = args[:first], list(args[first:])
        if shallow:
            budget().work(1 + (len(given[0]) if through and _sized(given[0]) else 0))
        else:
            given = plain(given)
            weights = [_seen(value) for value in (*given, *kwargs.values())]
            if pay is not None:
                pay(Given(given, kwargs, weights[0]))
        return checked(function(*before, *given, **kwargs))

    return called


def plain(values: Sequence[Any]) -> list[Any]:
    """Arguments without lazy ones among them, which nobody could weigh."""
    return [list(value) if isinstance(value, GeneratorType) else value for value in values]


def _sized(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, Undefined)


_LEFT_OUT = ("forceescape", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
_THROUGH = frozenset(("list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"))
_SHALLOW = _THROUGH | frozenset(
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
    budget().make(_replaced(str(given.args[0]), str(old), str(new)))


def _pay_indent(given: Given) -> None:
    width, text = given.argument(1, "width"), str(given.args[0])
    many = len(width) if isinstance(width, str) else _size([width])
    budget().make((len(text.splitlines()) + 2) * many + len(text))


def _pay_width(name: str) -> Pay:
    """The argument of that name, first after the value, is a width or a number of columns."""

    def pay(given: Given) -> None:
        many = _size([given.argument(1, name)])
        budget().make(many)
        budget().work(many)

    return pay


def _pay_format(given: Given) -> None:
    values = given.kwargs or tuple(given.args[1:])
    _pay_percent(str(given.args[0]), values, _seen(values))


def _pay_sum(given: Given) -> None:
    # Lists are copied again with every one that is added
    items = given.args[0] if isinstance(given.args[0], list | tuple) else ()
    if any(isinstance(item, list | tuple | dict) for item in items):
        budget().work(len(items) * given.weight.nodes)


def _pay_json(given: Given) -> None:
    indent, weight = given.argument(2, "indent"), given.weight
    many = len(indent) if isinstance(indent, str) else _size([indent], default=0)
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
