"""Ctrl-C and SIGTERM while native code runs that calls Python back."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

ENDING = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def held_signals() -> Iterator[list[int]]:
    """Within, SIGINT and SIGTERM are only noted in the list that is given; the first acts at the
    end as it would have at once.

    An exception of theirs would be raised in whatever is called back, and native code loses it.
    Signals that are ignored stay so. Other threads than the main one have no signals to hold.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {n: h for n in ENDING if (h := signal.getsignal(n)) not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
