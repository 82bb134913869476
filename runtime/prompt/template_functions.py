"""Costs of operators and calls of a template: paid before they run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import BuiltinMethodType, GeneratorType, MethodType
from typing import Any

from jinja2 import Environment
from jinja2.sandbox import SandboxedFormatter

from lvlm.runtime.prompt import literal_text
from lvlm.runtime.prompt.template_budget import BITS, TemplateCost, TemplateLimitError, budget

WIDTH = 10_000  # of a format, an indentation, a padding; numbers of columns and rows
_CONVERSION = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?")
_NESTED_KEY = re.compile(r"%\([^)]*\(")
_NUMBERS = re.compile(r"\d+")


def pay_operator(operator: str, left: Any, right: Any) -> None:
    seen(left)
    given = seen(right)
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
        pay_percent(left, right, given)


def _make(value: Any, times: int) -> None:
    """``times`` copies of a string's characters, or of a list's items."""
    if isinstance(value, str | bytes):
        budget().make(len(value) * times)
    elif isinstance(value, list | tuple):
        budget().work(len(value) * times)


def pay_percent(pattern: str, values: Any, weight: TemplateCost) -> None:
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
    """The value that was made, within bounds for the next one who takes it."""
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
        return value
    weight = seen(value)
    budget().make(4 * weight.nodes + 4 * weight.characters)  # quotes, commas, escapes
    return literal_text.written(value)


def seen(value: Any) -> TemplateCost:
    return budget().weigh(value)


# Calls


def plain(values: Sequence[Any]) -> list[Any]:
    """Arguments without lazy ones among them, which nobody could weigh."""
    return [list(value) if isinstance(value, GeneratorType) else value for value in values]


def pay_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A function, macro or method; returns the string, list or mapping that it is a method of."""
    budget().work()
    weights = [seen(value) for value in (*args, *kwargs.values())]
    owner = function.__self__ if isinstance(function, _METHODS) else None
    if isinstance(owner, str):
        given = (
            TemplateCost(*map(sum, zip(*weights, strict=True)))
            if weights
            else TemplateCost(0, 0, 0)
        )
        _pay_method(owner, function.__name__, args, given)
    elif isinstance(owner, list | tuple | dict):
        seen(owner)  # searched, or copied
    else:
        return None
    return owner


_METHODS = (BuiltinMethodType, MethodType)


def _pay_method(text: str, name: str, args: Sequence[Any], given: TemplateCost) -> None:
    pay = budget()
    pay.work(1 + len(text) // 64)
    first = args[0] if args else None
    if name in ("center", "ljust", "rjust", "zfill"):
        pay.make(bounded(first))
    elif name == "expandtabs":
        pay.make(text.count("\t") * bounded(first))
    elif name == "replace" and len(args) > 1 and isinstance(first, str):
        pay.make(replaced(text, first, str(args[1])))
    elif name == "join":
        pay.work(len(first) if isinstance(first, str) else 0)
        pay.make(given.characters + given.nodes * len(text))
    elif name in ("split", "rsplit"):
        pay.work(text.count(first) if isinstance(first, str) and first else len(text) // 2)
    elif name == "splitlines":
        pay.work(sum(text.count(end) for end in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"))


def replaced(text: str, old: str, new: str) -> int:
    return len(text) + len(new) * (text.count(old) if old else len(text) + 1)


def bounded(value: object, default: int = 8) -> int:
    """A width or a number of columns among the arguments of something."""
    if not isinstance(value, int):
        return default
    if abs(value) > WIDTH:
        raise TemplateLimitError(f"it asks for a width of more than {WIDTH}")
    return abs(value)


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        if any(len(n) > 5 or int(n) > WIDTH for n in _NUMBERS.findall(format_spec)):
            raise TemplateLimitError("it formats too widely")
        printed(value)
        return checked(super().format_field(value, format_spec))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        printed(value)
        if conversion and literal_text.has_hidden(value):
            value, of = literal_text.shown(value), value
            return literal_text.hidden(super().convert_field(value, conversion), of)
        return super().convert_field(literal_text.written(value), conversion)


def bounded_format(environment: Environment, method: Any) -> Callable[..., str]:
    """``format`` or ``format_map`` of a string."""
    text, by_mapping = str(method.__self__), method.__name__ == "format_map"

    def made(*args: Any, **kwargs: Any) -> str:
        if by_mapping:
            (kwargs,), args = args, ()
        budget().make(len(text))
        return str(_Formatter(environment).vformat(text, args, kwargs))

    return made
