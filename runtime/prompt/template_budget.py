"""Limits on what a chat template does: work and characters, counted as it goes, refused beforehand.

Every value that a template touches is weighed: a node of nested data costs 1, a string 1 and a
little per character. What is made is counted before it exists, so that neither memory nor time can
run away; nothing is interrupted, no thread or signal is needed.
"""

from __future__ import annotations

from collections.abc import Generator, ItemsView, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

WORK = 300_000  # nodes looked at, calls and passes through loops: less than a second
CHARACTERS = 16_000_000  # of all strings made
PER_NODE = 200  # more work for each node of what a template is given
PER_PIECE = 20  # and for each piece of text in it
PER_CHARACTER = 100
_SCANNED = 64  # characters that cost as much as a node
BITS = 20_000  # of the largest integer
_DEPTH = 200  # of nested data; Python's own hash of a deeper tuple overflows the stack


class TemplateLimitError(Exception):
    """The template asked for more than it may."""


class TemplateCost(NamedTuple):
    """Cost of a value with all that is in it, as often as it is in it: depth of nesting, too."""

    nodes: int
    characters: int
    depth: int


class Budget:
    """The rest of a rendering's work and characters."""

    def __init__(self, work: int = WORK, characters: int = CHARACTERS) -> None:
        self._work, self._characters = work, characters

    @classmethod
    def for_input(cls, values: object) -> Budget:
        """More for longer messages: what a template may do grows with what it is given."""
        weight = cls(2**62, 2**62).weigh(values)
        pieces = weight.characters // _SCANNED
        return cls(
            WORK + PER_NODE * (weight.nodes - pieces) + PER_PIECE * pieces,
            CHARACTERS + PER_CHARACTER * weight.characters,
        )

    def work(self, nodes: int = 1) -> None:
        self._work -= nodes
        if self._work < 0:
            raise TemplateLimitError("it takes too many steps")

    def make(self, characters: int) -> None:
        """Text of this length is about to be made."""
        self._characters -= characters
        if self._characters < 0:
            raise TemplateLimitError("it makes too much text")

    def weigh(self, value: object) -> TemplateCost:
        """Look at a value as deeply as printing, comparing or hashing it would; that is work."""
        if isinstance(value, str):
            nodes = 1 + len(value) // _SCANNED
            self.work(nodes)
            return TemplateCost(nodes, len(value), 0)
        nodes = characters = deepest = 0
        pending: list[tuple[Iterator[Any], int]] = [(iter((value,)), 0)]
        while pending:
            items, depth = pending[-1]
            for item in items:
                cost = 1
                if isinstance(item, str | bytes):
                    cost += len(item) // _SCANNED
                    characters += len(item)
                elif isinstance(item, int):
                    if item.bit_length() > BITS:
                        raise TemplateLimitError("it makes a number too large")
                    characters += 1 + item.bit_length() // 3
                elif isinstance(item, range):
                    cost += len(item)
                elif isinstance(item, _NESTED):
                    inside = _flat(item) if isinstance(item, dict) else iter(item)
                    pending.append((inside, depth + 1))
                    deepest = max(deepest, depth + 1)
                    if depth > _DEPTH:
                        raise TemplateLimitError("it nests data too deeply")
                nodes += cost
                self.work(cost)
                if pending[-1][0] is not items:
                    break
            else:
                pending.pop()
        return TemplateCost(nodes, characters, deepest)


_NESTED = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)


def _flat(mapping: dict[Any, Any]) -> Iterator[Any]:
    for key, value in mapping.items():
        yield key
        yield value


_current: ContextVar[Budget] = ContextVar("template_budget")


@contextmanager
def spending(budget: Budget) -> Generator[Budget]:
    """Context whose work is paid from this budget."""
    token = _current.set(budget)
    try:
        yield budget
    finally:
        _current.reset(token)


def budget() -> Budget:
    return _current.get()
