"""A conversation whose cache stays from one turn to the next, whatever the recipe."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lvlm.core.errors import ParameterError
from lvlm.runtime.engine.handle import Handle
from lvlm.runtime.options.generation_options import Keep

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11


class Session:
    """A conversation with an engine, made by ``Engine.session``. Any thread may use it.

    Give it to every turn: ``engine.submit(messages, session=session)``. What a turn has read and
    answered stays in its row of the cache, compressed as it is, and the next turn reads behind it
    what is new, as decode would have: what was evicted stays evicted (docs/engine.md). A turn is
    read as a whole where that cannot be: it does not begin with the conversation so far, asks for
    another keep or kv_keep, has no room left, or the row was needed for other requests.

    Close it, or use it as a context manager: its row is free then.

    Args:
        engine: whose turns it takes.
    """

    def __init__(self, engine: object) -> None:
        self._engine, self._closed = engine, False
        self._turn: Handle | None = None
        self._lock = threading.Lock()

    @property
    def closed(self) -> bool:
        """True once it takes no more turns, and its row is of no more use."""
        return self._closed

    def close(self) -> None:
        """Take no more turns. One that is being answered goes on."""
        self._closed = True

    def take(self, engine: object, handle: Handle, answers: int) -> None:
        """Take the next turn, for an engine.

        Args:
            engine: the one that answers it.
            handle: of the turn.
            answers: how many are asked for.

        Raises:
            ParameterError: more than one answer; the session is closed, of another engine, or its
                last turn is not answered yet.
        """
        if answers > 1:
            raise ParameterError(
                f"n is {answers}, but a conversation goes on from one answer; leave n or session "
                "out"
            )
        with self._lock:
            if self._engine is not engine:
                raise ParameterError(
                    "session is of another engine; take one of this engine.session()"
                )
            if self._closed:
                raise ParameterError("this session is closed; take a new one, engine.session()")
            if self._turn is not None and not self._turn.done:
                raise ParameterError(
                    "this session's last turn is not answered yet; wait for its answer, or cancel "
                    "it, or take a second session"
                )
            self._turn = handle

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<lvlm.Session{': closed' if self._closed else ''}>"


def check_one_turn(session: Session | None, many: bool) -> None:
    """Raises ParameterError where ``many`` prompts are given for one session."""
    if session is not None and many:
        raise ParameterError(
            "session goes with one prompt, a conversation's next turn, and here is a list of "
            "prompts; give one, or leave session out"
        )


@dataclass(frozen=True)
class Read:
    """History of a row's entries, but for what decode did: ``entries`` [L,1] entered each layer
    with the tokens that were read as a whole, at the ratios ``keep`` and ``kv_keep``; behind
    ``images`` of these are no more image tokens. Layer 0 gets all tokens. ``maps`` and ``rows`` are
    those of Generation and SeenImage, once they are read."""

    entries: np.ndarray
    keep: Keep | None
    kv_keep: float | None
    images: int
    maps: tuple[np.ndarray, ...] = ()
    rows: tuple[np.ndarray, ...] = ()

    def first(self, tokens: int) -> np.ndarray:
        """Entries [L,1] of so many tokens of the row, ``images`` or more, where nothing was
        evicted: each token behind these has one."""
        return self.entries + (tokens - int(self.entries[0, 0]))

    def of(self, tokens: int) -> Read:
        """The same of so many tokens of the row, ``images`` or more."""
        entered = int(self.entries[0, 0])
        more, maps = tokens - entered, []
        for full in self.maps if more else ():
            own = full[:entered]
            entered = int(own.max(initial=-1)) + 1
            maps.append(np.concatenate([own, entered + np.arange(more)])[: len(own) + more])
        return replace(self, entries=self.first(tokens), maps=tuple(maps) if more else self.maps)
