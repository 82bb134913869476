"""Integers that depend on the shapes of a call, as data.

A plan's output shapes, grids and scalar arguments are such expressions. Python evaluates them for
tests; the plugin library evaluates the same ones in C++, from their postfix form, either with
numbers (at enqueue) or with TensorRT's dimension expressions (while an engine is built).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Shapes = Mapping[str, Sequence[int]]

# Operations of two numbers; floors and ceilings are of numbers that are not negative.
BINARY: dict[str, Callable[[int, int], int]] = {
    "ADD": lambda a, b: a + b,
    "SUB": lambda a, b: a - b,
    "MUL": lambda a, b: a * b,
    "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
    "MAX": max,
    "MIN": min,
}


@dataclass(frozen=True)
class SizeToken:
    """One word of the postfix form: CONST value; EXTENT of axis ``value`` of input ``tensor``;
    NUMEL of input ``tensor``; or a name in BINARY."""

    kind: str
    tensor: str = ""
    value: int = 0


@dataclass(frozen=True)
class Size:
    """An expression; ``extent``, ``numel`` and ``const`` make the leaves."""

    tokens: tuple[SizeToken, ...]

    def __call__(self, shapes: Shapes) -> int:
        """The number, for these input shapes."""
        stack: list[int] = []
        for token in self.tokens:
            if token.kind == "CONST":
                stack.append(token.value)
            elif token.kind == "EXTENT":
                stack.append(int(shapes[token.tensor][token.value]))
            elif token.kind == "NUMEL":
                total = 1
                for extent in shapes[token.tensor]:
                    total *= int(extent)
                stack.append(total)
            else:
                second, first = stack.pop(), stack.pop()
                stack.append(BINARY[token.kind](first, second))
        return stack.pop()

    def __iter__(self) -> Iterator[SizeToken]:
        return iter(self.tokens)

    def _with(self, kind: str, other: Size | int) -> Size:
        return Size((*self.tokens, *as_size(other).tokens, SizeToken(kind)))

    def __add__(self, other: Size | int) -> Size:
        return self._with("ADD", other)

    def __sub__(self, other: Size | int) -> Size:
        return self._with("SUB", other)

    def __mul__(self, other: Size | int) -> Size:
        return self._with("MUL", other)

    def __floordiv__(self, other: Size | int) -> Size:
        return self._with("FLOOR_DIV", other)

    def ceil_div(self, other: Size | int) -> Size:
        return self._with("CEIL_DIV", other)

    def at_least(self, other: Size | int) -> Size:
        return self._with("MAX", other)

    def at_most(self, other: Size | int) -> Size:
        return self._with("MIN", other)


def const(value: int) -> Size:
    return Size((SizeToken("CONST", value=value),))


def extent(tensor: str, axis: int) -> Size:
    """The extent of an axis of an input; a negative axis counts from the end."""
    return Size((SizeToken("EXTENT", tensor, axis),))


def numel(tensor: str) -> Size:
    """The number of elements of an input."""
    return Size((SizeToken("NUMEL", tensor),))


def as_size(value: Size | int) -> Size:
    return value if isinstance(value, Size) else const(value)
