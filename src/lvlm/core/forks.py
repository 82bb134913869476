"""os.fork(): what was opened before it is refused in the child, at once.

Threads do not survive a fork. A graph that is run in the child waits for them for ever, and so does
one that is freed; so the child keeps what it cannot use.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Protocol

from lvlm.core.errors import BackendError


class Orphan(Protocol):
    def orphan(self) -> None:
        """Clean up in the child, right after the fork: locks may be held by threads that are
        gone."""


_orphans: weakref.WeakSet[Orphan] = weakref.WeakSet()
_LIBC = ctypes.CDLL(None)
_kept: weakref.WeakSet[object] = weakref.WeakSet()


def orphan_in_children(thing: Orphan) -> None:
    """Call its ``orphan`` in every forked child, as long as it lives."""
    _orphans.add(thing)


def keep_in_children(thing: object) -> None:
    """Never free ``thing`` in a forked child, at the end of the interpreter neither."""
    _kept.add(thing)


def forked(what: str) -> BackendError:
    return BackendError(
        f"this {what} was opened before os.fork(), and its threads stayed in the parent; open the "
        "bundle in this process, after the fork (multiprocessing: use spawn)"
    )


class Home:
    """The process that opened something."""

    def __init__(self, what: str) -> None:
        self._what, self._pid = what, os.getpid()

    def check(self) -> None:
        """Raises BackendError in a forked child."""
        if os.getpid() != self._pid:
            raise forked(self._what)


def _in_child() -> None:
    for thing in list(_kept):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
    if _kept and hasattr(_LIBC, "on_exit"):
        # Libraries' own destructors wait for those threads, too: leave before them
        _LIBC.on_exit(_LIBC._exit, None)
    for orphan in list(_orphans):
        orphan.orphan()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_in_child)
