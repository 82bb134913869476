"""A process of its own, for native code that may crash: a crash is then an error like others."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from lvlm.core.console import run_main
from lvlm.core.errors import BuildError

_LIBC = ctypes.CDLL(None)
PDEATHSIG = 1  # of prctl: the signal that comes when the parent is gone
PATIENCE = 10.0  # seconds for a process that was interrupted to clear up


def in_own_process(program: str, work: Callable[..., None], *arguments: Any) -> int:
    """The exit status of ``work(*arguments)``, run as a command is in a process of its own.

    program    the command's name, for messages
    work       a function of a module, as it is sent by name; ``arguments`` are pickled
    Ctrl-C and SIGTERM end both, and it never outlives this process. Raises BuildError if a signal,
    as of a crash, ended it.
    """
    process = multiprocessing.get_context("spawn").Process(
        target=_begin, args=(program, work, arguments)
    )
    # Until it can see to Ctrl-C itself
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        process.join()
    except KeyboardInterrupt:
        os.kill(process.pid or 0, signal.SIGINT)
        process.join(PATIENCE)
        raise
    finally:
        if process.is_alive():
            process.terminate()
            process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
    code = process.exitcode or 0
    if code < 0:
        raise BuildError(f"signal {-code} ({signal.strsignal(-code)}) ended it")
    return code


def _begin(program: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.setpgrp()  # a terminal's Ctrl-C comes once: from the parent
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(PDEATHSIG, signal.SIGTERM)

    def body() -> int:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        work(*arguments)
        return 0

    sys.exit(run_main(program, body))
