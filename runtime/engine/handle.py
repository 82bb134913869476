"""Handle of a request: its tokens as they come, its result, the way to cancel it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from lvlm.core.errors import LvlmError, RequestCancelled
from lvlm.core.forks import forked, orphan_in_children
from lvlm.runtime.engine.faults import typed
from lvlm.runtime.generate.answers import Generation, with_others
from lvlm.runtime.options.option_kinds import number, read_value
from lvlm.runtime.sampling.sampler import TokenScore

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11

WAIT = number("seconds, 0 or more, or None", lambda x: x >= 0)

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class News:
    """New tokens of an answer, and its new text.

    Args:
        tokens: token ids.
        text: what became final with them.
        scores: one for each token where logprobs were asked for, else none.
    """

    tokens: list[int]
    text: str
    scores: list[TokenScore]


class Handle:
    """A request to an engine. Every method may be called from any thread, iterators may be many.
    ``with`` cancels it at the end, if it is not done.

    Iterate for the pieces of text as they become final. A request that failed raises its error at
    the end of an iteration and from ``result``; what came before stays in ``text``. Nothing waits
    for a consumer: an answer nobody reads is kept here, at most max_new_tokens long.

    Where ``n`` answers were asked for it is the first one's; ``others`` are handles of the rest.
    ``result`` and ``wait`` wait for all, ``cancel`` ends all; every other method is about the one.

    Listeners are called without a lock held, so that they may call the engine and any handle.
    ``submitted`` is when it was made, in seconds of time.perf_counter().

    Args:
        wake: called when the caller has cancelled.
        others: handles of the further answers to the same prompt.
    """

    def __init__(self, wake: Callable[[], None], others: Sequence[Handle] = ()) -> None:
        self._wake = wake
        self.others = tuple(others)
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._times: list[float] = []
        self._scores: list[TokenScore] = []
        self._result: Generation | None = None
        self._error: LvlmError | None = None
        self.submitted = time.perf_counter()
        orphan_in_children(self)

    # For callers

    def __iter__(self) -> Iterator[str]:
        return (piece for piece in self._follow(self._pieces) if piece)

    def tokens(self) -> Iterator[int]:
        """Iterate over the token ids of the answer.

        Returns:
            Iterator over those there are and those to come, as they are chosen.

        Raises:
            LvlmError: the request's error, after the last token.
        """
        return self._follow(self._tokens)

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the answer.

        Args:
            timeout: seconds to wait at most. None: no limit.

        Returns:
            Generation; its ``others`` are the further answers.

        Raises:
            TimeoutError: the wait was too short; the request goes on.
            ParameterError: the timeout is no number of 0 or more, or the asked structure takes too
                much work to follow.
            RequestTimeout: the request was not answered within its own timeout.
            RequestCancelled: it was cancelled.
            EngineClosedError: the engine was closed first.
            BackendError, DeviceMemoryError: a graph failed, or its logits are not finite; or this
                process was forked from the engine's.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"no answer after {timeout} s; wait longer, or cancel")
        return with_others([one.own_result() for one in (self, *self.others)])

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, one way or the other.

        Args:
            timeout: seconds to wait at most. None: no limit.

        Returns:
            Whether the end has come.

        Raises:
            ParameterError: the timeout is no number of 0 or more.
        """
        if timeout is not None:
            timeout = read_value("timeout", WAIT, timeout)
        until = None if timeout is None else time.perf_counter() + timeout
        return all(one._wait_until(until) for one in (self, *self.others))

    def cancel(self) -> bool:
        """Stop the request: its slot is free before the next token.

        Returns:
            False where it and all its ``others`` had ended already.
        """
        stopped = [one._cancel() for one in (self, *self.others)]
        return any(stopped)

    @property
    def done(self) -> bool:
        """True once the request has ended, one way or the other."""
        return self._result is not None or self._error is not None

    @property
    def all_done(self) -> bool:
        """True once the ``others`` have ended, too."""
        return self.done and all(other.done for other in self.others)

    @property
    def text(self) -> str:
        """The final text so far."""
        return "".join(self._pieces)

    @property
    def token_ids(self) -> list[int]:
        """The token ids so far."""
        return list(self._tokens)

    @property
    def token_times(self) -> list[float]:
        """Times at which the tokens so far were chosen, in seconds of time.perf_counter()."""
        return list(self._times)

    def since(self, count: int) -> News:
        """Read what came after the first tokens.

        Args:
            count: how many tokens are known already.

        Returns:
            The tokens behind these, with the text and scores that came with them.
        """
        with self._changed:
            text = "".join(self._pieces[count:])
            return News(self._tokens[count:], text, self._scores[count:])

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Have a function called now, and whenever there is more to read.

        Args:
            listener: called from the engine's thread, or the one that ends the request: it has to
                be quick, and not to wait for an answer. What it raises is logged.
        """
        with self._changed:
            self._listeners.append(listener)
        self._tell([listener])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()

    def __repr__(self) -> str:
        ended = "answered" if self._error is None else type(self._error).__name__
        state = ended if self.done else "going on"
        return f"<lvlm.Handle: {state}, {len(self._tokens)} tokens>"

    # For the engine

    def push(self, token: int, piece: str, score: TokenScore | None) -> None:
        """Add a token to the answer; nothing happens where it has ended.

        Args:
            token: its id.
            piece: the text that is final with it, which may be empty.
            score: where logprobs were asked for.
        """
        with self._changed:
            if self.done:
                return
            self._tokens.append(token)
            if score is not None:
                self._scores.append(score)
            self._times.append(time.perf_counter())
            self._pieces.append(piece)
            self._changed.notify_all()
            listeners = list(self._listeners)
        self._tell(listeners)

    def finish(self, result: Generation) -> bool:
        """End with an answer.

        Args:
            result: the answer.

        Returns:
            False where it had ended already.
        """
        return self._end(result, None)

    def fail(self, error: Exception) -> bool:
        """End without an answer.

        Args:
            error: the reason; one of another type becomes a BackendError.

        Returns:
            False where it had ended already.
        """
        return self._end(None, typed(error))

    def _end(self, result: Generation | None, error: LvlmError | None) -> bool:
        with self._changed:
            if self.done:
                return False
            self._result, self._error = result, error
            self._wake = _nothing  # a handle that is kept does not keep the engine
            self._changed.notify_all()
            listeners, self._listeners = self._listeners, []
        self._tell(listeners)
        return True

    def check(self) -> None:
        """Check this one's answer alone.

        Raises:
            LvlmError: what went wrong with it, so far.
        """
        if self._error is not None:
            raise self._error.with_traceback(None)

    def own_result(self) -> Generation:
        """Take this one's answer alone; it has ended.

        Returns:
            Generation without ``others``.

        Raises:
            LvlmError: its error.
        """
        self.check()
        assert self._result is not None
        return self._result

    def _wait_until(self, until: float | None) -> bool:
        left = None if until is None else max(0.0, until - time.perf_counter())
        with self._changed:
            return self._changed.wait_for(lambda: self.done, left)

    def _cancel(self) -> bool:
        wake = self._wake
        stopped = self.fail(RequestCancelled("the request was cancelled"))
        if stopped:
            wake()
        return stopped

    def orphan(self) -> None:
        """Fail in a forked child: nobody answers there, and whoever held the lock is gone."""
        self._changed = threading.Condition()
        self._listeners.clear()
        self.fail(forked("engine"))

    @staticmethod
    def _tell(listeners: Sequence[Callable[[], None]]) -> None:
        for listener in listeners:
            try:
                listener()
            except Exception:
                log.exception("a listener of a request failed")

    def _follow(self, items: list[T]) -> Iterator[T]:
        """The items, those there already and those to come."""
        index = 0
        while True:
            with self._changed:
                while index == len(items) and not self.done:
                    self._changed.wait()
                if index == len(items):
                    break
                item = items[index]
            yield item
            index += 1
        self.check()


def _nothing() -> None:
    """Nothing: there is no engine to wake for a request that has ended."""
