"""Parts shared by all commands: mistakes as one line, exit statuses, flags with suggestions."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import difflib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from lvlm.core.errors import LvlmError, shown
from lvlm.core.version import DISTRIBUTION, version

USER_ERROR = 2
INTERRUPTED = 130  # as shells report a program that SIGINT ended
TERMINATED = 143  # and one that SIGTERM ended


class _Terminated(BaseException):
    """SIGTERM came: what was begun is undone on the way out, as with Ctrl-C."""


def run_main(program: str, body: Callable[[], int]) -> int:
    """The exit status of ``body``, which reads the command line and does the work, with what a user
    can mend turned into a message.

    What a user or the machine can mend (an ``LvlmError``, out of memory, what the system refuses)
    is ``program: error: …`` on stderr and status 2. Ctrl-C is 130, SIGTERM 143, an output pipe that
    is closed (``… | head``) the end of the work and 0, all without a word. Anything else is a bug
    and keeps its traceback.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - print would use standard output
    if sys.stdout is None:
        return _fail(program, "standard output is closed; send it to a file, or to /dev/null")
    try:
        with _signals():
            return _flushed(body)
    except LvlmError as error:
        return _fail(program, "\n".join(filter(None, (str(error), error.details))))
    except MemoryError as error:
        detail = f" ({error})" if str(error) else ""
        return _fail(program, f"not enough memory{detail}; free some, or use a smaller model")
    except KeyboardInterrupt:
        return INTERRUPTED
    except _Terminated:
        return TERMINATED
    except BrokenPipeError:
        _discard(sys.stdout)
        return 0
    except OSError as error:
        if error.errno is None:
            raise
        _discard(sys.stdout)
        where = "its output" if error.filename is None else shown(str(error.filename))
        return _fail(program, f"{where} cannot be read or written: {error.strerror}")


def _flushed(body: Callable[[], int]) -> int:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # an answer may not fit a terminal's encoding
    try:
        return body()
    finally:
        sys.stdout.flush()  # while what goes wrong can still be told


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Signals are exceptions meanwhile. Of the main thread: others cannot have it so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, _terminate),
    }
    hook, sys.unraisablehook = sys.unraisablehook, _come_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _come_again(lost: sys.UnraisableHookArgs) -> None:
    """A signal that came within a finalizer, where its exception ends, is sent once more."""
    numbers = {KeyboardInterrupt: signal.SIGINT, _Terminated: signal.SIGTERM}
    if lost.exc_type not in numbers:
        sys.__unraisablehook__(lost)
        return
    number = numbers[lost.exc_type]

    def send() -> None:
        time.sleep(0.1)  # by then the finalizer has ended
        os.kill(os.getpid(), number)

    _thread.start_new_thread(send, ())  # Thread.start would wait, within the finalizer


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def _discard(stream: TextIO) -> None:
    """Send what is still to be flushed at the exit nowhere: it would fail again."""
    with contextlib.suppress(OSError, ValueError):  # not a real file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(program: str, message: str) -> int:
    try:
        print(f"{program}: error: {message}", file=sys.stderr, flush=True)
    except OSError:  # nobody can be told
        _discard(sys.stderr)
    return USER_ERROR


class _Version(argparse.Action):
    """Prints what is installed, and ends; it is looked up only then."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "dest": argparse.SUPPRESS})

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"{DISTRIBUTION} {version()}")
        parser.exit()


def add_verify(add: Callable[..., Any]) -> None:
    """--verify, for every command that loads a bundle."""
    add(
        "--verify",
        choices=("sample", "full", "none"),
        default="sample",
        help="compare the bundle's files with their hashes: sample (default) reads large files "
        "once as a whole and then some blocks of them, full all of everything",
    )


class Parser(argparse.ArgumentParser):
    """argparse with one line for a mistake, and the nearest flags for an unknown one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})
        self._texts: list[str] = []  # arguments that look like flags and are none
        self.add_argument("--version", action=_Version, nargs=0, help="what is installed")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        self._texts = list(filter(self._is_text, sys.argv[1:] if args is None else args))
        parsed, rest = self.parse_known_args(args, namespace)
        if rest and not rest[0].startswith("-"):
            self.error(f"too many arguments: {shown(rest[0])}; put text with spaces in quotes")
        if rest:
            flag = rest[0].partition("=")[0]
            if flag in self._flags():
                self.exit(USER_ERROR, f"{self.prog}: error: {flag} comes after --; put it before\n")
            self.error(f"unknown argument {rest[0]}{self._nearest(flag)}")
        return parsed

    def print_help(self, file: Any = None) -> None:
        """argparse's own is silent about an output that takes nothing."""
        print(self.format_help(), end="", file=file)

    def _nearest(self, flag: str) -> str:
        """First what it is the beginning of: --temp."""
        whole = [f for f in self._flags() if len(flag) > 3 and f.startswith(flag)]
        close = whole or difflib.get_close_matches(flag, self._flags(), n=3, cutoff=0.6)
        return f"; did you mean {' or '.join(close)}?" if close else ""

    def _is_text(self, argument: str) -> bool:
        """True where it begins as a flag does and is none, nor a number: -5+3?"""
        if argument.partition("=")[0] in self._flags():
            return False
        with contextlib.suppress(ValueError):
            float(argument)
            return False
        return re.match(r"-(\d|[^-].*\s|--)", argument) is not None

    def _flags(self) -> list[str]:
        """Its own, and those of its subcommands."""
        actions = self._subparsers._group_actions if self._subparsers else []
        below = [parser for action in actions for parser in dict(action.choices or {}).values()]
        return [flag for parser in (self, *below) for flag in parser._option_string_actions]

    def error(self, message: str) -> NoReturn:
        if self._texts:
            text = self._texts[0][:40]
            message += f"; text that begins with - comes last, after --: -- '{text}'"
        self.exit(USER_ERROR, f"{self.prog}: error: {message} ({self.prog} --help lists all)\n")
