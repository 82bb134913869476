"""Open a file that somebody named, whatever kind of file it is."""

from __future__ import annotations

import os


def at_once(path: str, flags: int) -> int:
    """An ``opener`` for ``open``: it does not wait for somebody to write into a named pipe, which
    then has nothing in it. What is read from a pipe that has a writer comes as it is written."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    os.set_blocking(descriptor, True)
    return descriptor
