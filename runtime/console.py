"""What all commands share: mistakes as one line, exit statuses, flags with suggestions."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lvlm.runtime.errors import LvlmError
from lvlm.runtime.version import DISTRIBUTION, version

USER_ERROR = 2
INTERRUPTED = 130  # as shells report a program that SIGINT ended
BROKEN_PIPE = 141  # and one that SIGPIPE ended


def run_main(program: str, body: Callable[[], int]) -> int:
    """The exit status of ``body``, with what a user can mend turned into a message.

    An ``LvlmError`` or a lack of memory is ``program: error: …`` on stderr and status 2; Ctrl-C is
    130 and a closed output pipe (``… | head``) is 141, both without a word. Anything else is a bug
    and keeps its traceback.
    """
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # an answer may not fit a terminal's encoding
        status = body()
        sys.stdout.flush()
        return status
    except LvlmError as error:
        return _fail(program, "\n".join(filter(None, (str(error), error.details))))
    except MemoryError as error:
        detail = f" ({error})" if str(error) else ""
        return _fail(program, f"not enough memory{detail}; free some, or use a smaller model")
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # not a real file: nothing to flush at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _fail(program: str, message: str) -> int:
    print(f"{program}: error: {message}", file=sys.stderr)
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
        if rest:
            self.error(f"unknown argument {rest[0]}{self._nearest(rest[0].partition('=')[0])}")
        return parsed

    def _nearest(self, flag: str) -> str:
        """First what it is the beginning of: --temp."""
        whole = [f for f in self._flags() if len(flag) > 3 and f.startswith(flag)]
        close = whole or difflib.get_close_matches(flag, self._flags(), n=3, cutoff=0.6)
        return f"; did you mean {' or '.join(close)}?" if close else ""

    def _is_text(self, argument: str) -> bool:
        """Whether it begins as a flag does and is none, nor a number: -5+3?"""
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
