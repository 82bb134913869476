"""Slots of the cache: which row belongs to whom, and what finished requests left in it for others.

Rows 0 to n - 1 are those of the n running requests, so that decode reads exactly them: a view of
the buffers, of whatever batch size. A request that ends gives its place to the last running one.
The other rows are free, being filled by prefill, or kept: the entries of a finished request, to be
used again by a prompt that begins alike, or by the next turn of its session.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lvlm.runtime.engine.request import Request
from lvlm.runtime.engine.session import Read, Session
from lvlm.runtime.kv.cache import CompactCache


@dataclass(frozen=True)
class Kept:
    """Content of a row: ``keys`` of its tokens, how they were ``read``, whose turns go on there."""

    keys: np.ndarray
    read: Read | None = None
    session: Session | None = None

    @property
    def waits(self) -> bool:
        """True where a session's next turn may come."""
        return self.session is not None and not self.session.closed


@dataclass(frozen=True)
class Prefix:
    """Tokens 0 to ``length`` of a row, which a new prompt begins with, and how they were
    ``read``; ``whole``: the row holds no more, and is a session's own."""

    row: int
    length: int
    read: Read | None = None
    whole: bool = False


class Slots:
    """The rows of one cache. For one thread; ``check`` states what always holds.

    ``in_place``: the entries of tokens depend on nothing but the tokens before them, so that any
    beginning may be shared, or, where layers have states, all that a row holds. Else a session's
    next turn begins with all that its row holds, and others, with ``keeps_prefixes``, with what
    goes as far as the images do (question-free recipes).
    """

    def __init__(self, cache: CompactCache, *, keeps_prefixes: bool, in_place: bool = True) -> None:
        self.cache, self.keeps_prefixes, self.in_place = cache, keeps_prefixes, in_place
        self.count = len(cache.steps)
        self.running: list[Request] = []
        self.filling = range(0)  # the rows that prefill writes
        self.kept: dict[int, Kept] = {}  # the oldest first
        cache.active = 0

    def room(self, count: int) -> bool:
        """True where as many rows can be reserved: one group at a time is being filled."""
        return not self.filling and len(self.running) + count <= self.count

    def reserve(
        self, count: int, keys: np.ndarray | None = None, session: Session | None = None
    ) -> tuple[slice, Prefix | None]:
        """Rows to be filled, for which there is ``room``; and what may be copied into the first
        row, that of a prompt with these ``keys``, a turn of the ``session``.

        They are the next running ones, so that nothing has to move when they are full, unless
        another one ends until then.
        """
        assert self.room(count)
        first = len(self.running)
        prefix = None if keys is None else self._longest(keys, session)
        if prefix is not None and prefix.row in self.kept:
            self.kept[prefix.row] = self.kept.pop(prefix.row)  # used last
        for row in range(first, first + count):
            moved = self._vacate(row, first + count)
            if prefix is not None and prefix.row == row:
                prefix = replace(prefix, row=moved)
        self.filling = range(first, first + count)
        return slice(first, first + count), prefix

    def fill_from(self, prefix: Prefix) -> None:
        """The first reserved row takes what it shares with another one."""
        row = self.filling[0]
        if prefix.row != row:
            self.cache.copy_row(prefix.row, row)
        if prefix.whole:  # the counts go on, too
            return
        count = np.full((len(self.cache.lengths), 1), prefix.length)
        if not self.in_place and prefix.read is not None:
            count = prefix.read.first(prefix.length)
        self.cache.begin(count, count, slice(row, row + 1))

    def fork(self, sources: Sequence[int]) -> None:
        """Fill the reserved rows that are copies: ``sources`` says of each which one it is."""
        for index, source in enumerate(sources):
            if index != source:
                self.cache.copy_row(self.filling[source], self.filling[index])

    def abandon(self) -> None:
        """The reserved rows are free again, and clean: what was written there may not be finite."""
        for row in self.filling:
            self.cache.clear_row(row)
        self.filling = range(0)

    def start(self, requests: Sequence[Request]) -> range:
        """The reserved rows, filled, become the last running ones; their places."""
        assert len(requests) == len(self.filling)
        first = len(self.running)
        for place, row in enumerate(self.filling, first):
            if row != place:
                self._vacate(place, place + 1)
                self.cache.copy_row(row, place)
        self.filling = range(0)
        self.running.extend(requests)
        self.cache.active = len(self.running)
        return range(first, len(self.running))

    def release(self, place: int, *, keep: bool) -> None:
        """A running request has ended; ``keep`` its entries for others or its session, where there
        is a row for them, or clear them: after a fault they may not be finite."""
        request, last = self.running[place], len(self.running) - 1
        if not keep:
            self.cache.clear_row(place)
        if keep and (self.keeps_prefixes or request.session is not None):
            if place == last:
                self._remember(place, request)
            elif (spare := self._spare(last + 1)) is not None:
                self.cache.copy_row(place, spare)
                self.kept.pop(spare, None)
                self._remember(spare, request)
        if place != last:
            self.cache.copy_row(last, place)
            self.running[place] = self.running[last]
        self.running.pop()
        self.cache.active = last

    def check(self) -> None:
        """Every row has one use."""
        first = len(self.running)
        assert self.cache.active == first <= self.count
        assert all(first <= row < self.count for row in self.kept)
        assert all(first <= row < self.count for row in self.filling)
        assert not self.kept.keys() & set(self.filling)
        assert len({id(request) for request in self.running}) == first

    def _longest(self, keys: np.ndarray, session: Session | None) -> Prefix | None:
        """The row that shares most with a prompt, all but its last token at most."""
        if self.keeps_prefixes:
            held = {row: self._entries(row, request) for row, request in enumerate(self.running)}
            held |= self.kept
        else:
            theirs = self.kept.items() if session is not None else ()
            held = {row: kept for row, kept in theirs if kept.session is session}
        shared = {row: _shared(other.keys, keys[:-1]) for row, other in held.items()}
        if self.cache.states:  # they are those after all tokens of a row, not after fewer
            shared = {row: n for row, n in shared.items() if n == len(held[row].keys)}
        whole: set[int] = set()
        if not self.in_place:
            own = [r for r, k in self.kept.items() if session is not None and k.session is session]
            whole = {row for row in own if shared[row] == len(held[row].keys)}
            far = {row for row, n in shared.items() if self._beyond_images(n, held[row])}
            shared = {row: n for row, n in shared.items() if row in whole | far}
        best = max(shared, key=lambda row: (row in whole, shared[row]), default=None)
        if best is None or not shared[best]:
            return None
        return Prefix(best, shared[best], held[best].read, best in whole)

    def _beyond_images(self, shared: int, kept: Kept) -> bool:
        """True where it ends behind the images of what was read as a whole."""
        return self.keeps_prefixes and kept.read is not None and shared >= kept.read.images

    def _remember(self, row: int, request: Request) -> None:
        """A session has one row: that of its last turn."""
        if request.session is not None:
            self.kept = {r: k for r, k in self.kept.items() if k.session is not request.session}
        self.kept[row] = self._entries(row, request)

    def _entries(self, row: int, request: Request) -> Kept:
        """Content of a row: less than its tokens while decode reads a prompt's rest."""
        keys = request.held_keys()[: int(self.cache.seen[0, row])]
        return Kept(keys, request.read, request.session)

    def _spare(self, first: int) -> int | None:
        """A row from ``first`` on for entries to be kept: a free one, or that of the least used,
        sessions' last."""
        rows = (r for r in range(first, self.count) if r not in self.kept and r not in self.filling)
        free = next(rows, None)
        if free is not None:
            return free
        return min(self.kept, key=lambda row: self.kept[row].waits, default=None)

    def _vacate(self, row: int, first: int) -> int:
        """Put what is kept in ``row`` elsewhere, from ``first`` on, if there is room: where it is
        now, or ``row``."""
        if row not in self.kept:
            return row
        target = self._spare(first)
        assert target is not None
        if target == row:
            del self.kept[row]
            return row
        self.cache.copy_row(row, target)
        self.kept.pop(target, None)
        # Used as long ago as before: rebuilt in the same order
        self.kept = {target if r == row else r: kept for r, kept in self.kept.items()}
        return target


def _shared(held: np.ndarray, wanted: np.ndarray) -> int:
    """Number of the first keys that are the same."""
    both = min(len(held), len(wanted))
    unlike = np.flatnonzero(held[:both] != wanted[:both])
    return int(unlike[0]) if len(unlike) else both
