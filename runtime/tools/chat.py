"""``lvlm-run --chat``: a conversation in the terminal, over an engine of one slot that keeps what
it has read for the next turn, with ``--session`` whatever the recipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lvlm.core.discovery import nearest
from lvlm.core.errors import CapacityError, LvlmError, ParameterError, PromptError
from lvlm.runtime.engine import Engine
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.media.images import open_image
from lvlm.runtime.options.generation_options import GenerationOptions

HELP = """\
/image PATH  show an image with the next message; repeatable
/video PATH  show a video with it, where the model takes one
/reset       begin anew
/help        this list
/quit        end, as does the end of the input
Anything else is a message; one that begins with / is written with two. Ctrl-C stops
an answer, and where a line is waited for ends all."""


class Chat:
    """A conversation with an engine: what was said, and what the next message will show.

    ``say`` takes text of answers as it comes, ``note`` a line about them, ``tell`` one that was
    asked for, or a mistake's, which changes nothing. ``stats``: notes are long. ``session``: the
    conversation is one of the engine's.
    """

    def __init__(
        self,
        engine: Engine,
        options: GenerationOptions,
        say: Callable[[str], object],
        note: Callable[[str], object],
        tell: Callable[[str], object],
        stats: bool = False,
        session: bool = False,
    ) -> None:
        self._engine, self._options, self._stats = engine, options, stats
        self._say, self._note, self._tell = say, note, tell
        self._session = engine.session() if session else None
        self.history: list[dict[str, Any]] = []
        self.pending: list[dict[str, Any]] = []

    def take(self, line: str) -> bool:
        """One line of the user's; whether the conversation goes on."""
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return False
        try:
            if not command.startswith("/") or command.startswith("//"):
                if line.strip():
                    self._ask(line.strip().replace("//", "/", 1) if command[:2] == "//" else line)
            elif command == "/help":
                self._tell(HELP)
            elif command == "/reset":
                self.history, self.pending = [], []
                if self._session is not None:
                    self._session.close()
                    self._session = self._engine.session()
                self._note("a new conversation")
            elif command in ("/image", "/video"):
                self.show(command[1:], rest.strip())
            else:
                raise nearest("command", command, COMMANDS)
        except CapacityError as error:
            self._tell(f"error: {error}; /reset begins anew")
        except LvlmError as error:
            self._tell(f"error: {error}")
        return True

    def show(self, kind: str, path: str) -> None:
        """An image or a video with the next message, if there is such a thing and room for it."""
        if not path:
            raise ParameterError(f"/{kind} shows a file; write /{kind} PATH")
        source: Any = os.path.expanduser(path.strip("\"'"))
        if kind == "image":
            source = _content(source, self._options)  # as it is now, in every later turn
        part = {"type": kind, kind: source}
        count = self._engine.count_tokens(
            [*self.history, _user([*self.pending, part])], options=self._options
        )
        self.pending.append(part)
        self._note(f"{count.prompt_tokens} tokens with it; room for {count.new_tokens} more")

    def _ask(self, text: str) -> None:
        message = _user([*self.pending, {"type": "text", "text": text}])
        said: list[str] = []
        result: Generation | None = None
        stopped = False
        try:
            with self._engine.stream(
                [*self.history, message], options=self._options, session=self._session
            ) as stream:
                for piece in stream:
                    said.append(piece)
                    self._say(piece)
                result = stream.result
        except KeyboardInterrupt:
            stopped = True
        finally:
            if said:
                self._say("\n")
        if stopped:
            self._note("stopped")
        if said or result is not None:
            self.history += [message, {"role": "assistant", "content": "".join(said)}]
            self.pending = []
        if result is not None:
            self._note(self._counts(result))

    def _counts(self, answer: Generation) -> str:
        """Tokens of a turn."""
        stats = answer.stats
        line = f"{stats.prompt_tokens + stats.new_tokens} tokens"
        if self._stats:
            line = (
                f"prompt {stats.prompt_tokens} tokens ({stats.image_tokens} of them image tokens), "
                f"{stats.reused_tokens} reused; new {stats.new_tokens}; prefill "
                f"{stats.prefill_ms:.0f} ms, decode {stats.decode_tokens_per_second:.1f} tokens/s; "
                f"cache {stats.cache_bytes_used:,} bytes"
            )
        if answer.capacity_reached:
            line += "; cut: the bundle's cache is full (/reset begins anew)"
        return line


COMMANDS = ("/help", "/image", "/quit", "/reset", "/video")


def converse(chat: Chat) -> int:
    """Hold a conversation by lines of standard input, to their end. Exit status 0.

    Raises KeyboardInterrupt for Ctrl-C where a line is waited for, PromptError for bytes that are
    no text.
    """
    while (line := _line()) is not None and chat.take(line):
        pass
    return 0


def _line() -> str | None:
    """The next line; None at the end of the input."""
    try:
        if sys.stdin is None or not sys.stdin.isatty():
            line = sys.stdin.readline() if sys.stdin is not None else ""
            return line.rstrip("\r\n") if line else None
        return input("> ")
    except (EOFError, KeyboardInterrupt) as end:
        if sys.stdin is not None and sys.stdin.isatty():
            print()
        if isinstance(end, KeyboardInterrupt):
            raise
        return None
    except UnicodeDecodeError:
        raise PromptError("standard input is not valid text; pass UTF-8") from None


def _user(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": "user", "content": parts}


def _content(path: str, options: GenerationOptions) -> bytes | str:
    """The bytes of an image's file. Raises ImageError for what is none, of whatever size."""
    open_image(path, options.max_image_pixels)
    try:
        return Path(path).read_bytes() if os.path.isfile(path) else path
    except OSError:
        return path
