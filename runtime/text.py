"""Text in and out: tokens, text as it streams, chat templates, places of pictures in prompts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import tokenizers
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lvlm.runtime.errors import BundleError, ParameterError, PromptError


class Tokenizer:
    """A bundle's ``tokenizer.json``. ``eos_ids`` end a text. Any thread may use it.

    Raises ``BundleError`` if the file is missing or is not a tokenizer.
    """

    def __init__(self, path: str | os.PathLike[str], eos_ids: Sequence[int]) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(
                f"{os.fspath(path)} is not a tokenizer ({_line(error)}); export the bundle again"
            ) from None
        # A tokenizer.json may carry settings of a training run: a prompt must not be cut or padded
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(number for number, token in added.items() if token.special)
        self.eos_ids = frozenset(eos_ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written out in it count as special tokens.

        Raises ``PromptError`` for half a surrogate pair, as undecodable command line bytes become.
        """
        try:
            encoded = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:
            raise PromptError("the prompt is not valid Unicode; pass UTF-8 text") from None
        return list(encoded.ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, without special tokens and ids that the vocabulary lacks."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token_id(self, token: str) -> int:
        """Id of a token by its exact content. Raises ``BundleError`` if there is none."""
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise BundleError(f"the tokenizer has no token {token!r}; export the bundle again")
        return number

    def visible_token(self, token_id: int) -> str | None:
        """The token as the vocabulary has it, or None if ``decode`` leaves it out."""
        return None if token_id in self._special else self._tokenizer.id_to_token(token_id)


class TextStream:
    """Turns one row's tokens into text, piece by piece. What it has returned never changes.

    The pieces and what ``finish`` returns, put together, are ``decode`` of all tokens, cut before
    the first stop string. First is the one that is complete first, and of two complete at once the
    longer. ``stopped`` tells whether there was one. Raises ``ParameterError`` for an empty stop
    string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise ParameterError("a stop string is empty; leave it out or give it text")
        self.stopped = False
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the last tokens, with enough of a past to be decoded right
        self._sent = 0  # characters of the window's text that are through
        self._held = ""  # final text that a stop string may begin in

    def push(self, token_id: int, *, last: bool = False) -> str:
        """The text that became final with this token; often empty."""
        piece = self._push(token_id)
        return piece + self.finish() if last else piece

    def _push(self, token_id: int) -> str:
        token = self._tokenizer.visible_token(token_id)
        if self.stopped or token is None:
            return ""
        self._window.append(token_id)
        if _BYTE_TOKEN.fullmatch(token):
            return ""  # bad bytes at the end of a run of byte tokens spoil its beginning in decode
        text = self._tokenizer.decode(self._window)
        # A replacement character at the end may be a character that is still incomplete
        final = len(text) - text.endswith("\ufffd")
        fresh = text[self._sent : final]
        self._sent = max(self._sent, final)
        self._shorten(text)
        return self._release(fresh)

    def finish(self) -> str:
        """The text that was held back. Call it once, after the last token."""
        if self.stopped:
            return ""
        text = self._release(self._tokenizer.decode(self._window)[self._sent :])
        self._window, self._sent = [], 0
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _shorten(self, text: str) -> None:
        """Forget tokens that no longer matter, when the window, whose text is ``text``, is long.

        The kept ones give the next token its leading space. They are ``_TAIL`` because a character
        of UTF-8 has up to 4 bytes and a token at least one: cutting an older one in two changes
        what is sent already, never what comes.
        """
        if len(self._window) > _WINDOW and (rest := self._tokenizer.decode(self._window[-_TAIL:])):
            del self._window[:-_TAIL]
            self._sent -= len(text) - len(rest)

    def _release(self, fresh: str) -> str:
        text = self._held + fresh
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_WINDOW = 16
_TAIL = 4


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of ``stop``, short of all of it, that ``text`` ends with."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )


def expand_placeholders(
    ids: list[int], image_token_id: int, pictures: Sequence[Sequence[int]]
) -> list[int]:
    """``ids`` with the m-th image placeholder replaced by the tokens of the m-th picture.

    Raises ``PromptError`` unless there are as many placeholders as pictures.
    """
    places = ids.count(image_token_id)
    if places != len(pictures):
        raise PromptError(
            f"the prompt has {_plural(places, 'image placeholder')} "
            f"for {_plural(len(pictures), 'image')}; "
            "write one per image, or none and use the chat template"
        )
    remaining = iter(pictures)
    return [
        made for token in ids for made in (next(remaining) if token == image_token_id else [token])
    ]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class ChatTemplate:
    """A bundle's chat template, run in a sandbox as transformers runs it. Any thread may use it.

    ``source`` is Jinja, ``special_tokens`` the variables it may use (``bos_token``, …), and
    ``image_token`` the placeholder that it writes for a picture. Raises ``BundleError`` if the
    template is not valid.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], image_token: str) -> None:
        self._special_tokens = dict(special_tokens)
        self._image_token = image_token
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # RecursionError and others, besides TemplateSyntaxError
            raise BundleError(f"the bundle's chat template is not valid: {_line(error)}") from None

    def render(
        self,
        prompt: str,
        images: int,
        system: str | None = None,
        videos: int = 0,
        video_token: str | None = None,
    ) -> str:
        """The text of a user message, ``images`` pictures and ``videos`` clips before ``prompt``,
        ready for the answer.

        A prompt that has the placeholder of one or the other in it keeps its own places: no others
        of these are added. ``system`` is the text of a system message. Raises ``PromptError`` if
        the template refuses the messages, ``BundleError`` if it fails or reaches for what the
        sandbox forbids.
        """
        parts = [] if self._image_token in prompt else [{"type": "image"}] * images
        if videos and not (video_token and video_token in prompt):
            parts += [{"type": "video"}] * videos
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        variables = {
            **self._special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            return self._template.render(variables)
        except PromptError:
            raise
        except SecurityError as error:
            raise BundleError(
                f"the bundle's chat template does what templates may not: {_line(error)}"
            ) from None
        except Exception as error:  # a template can raise whatever its expressions can
            raise BundleError(
                f"the bundle's chat template fails: {_line(error)}; "
                "write the prompt out and use chat_template=False"
            ) from None


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # Jinja's own gives a value that raises when it is used, but is printed as nothing
        raise SecurityError(f"access to {attribute!r} of {type(obj).__name__}")


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks text to train on; here its body is text like any other."""

    tags = {"generation"}  # noqa: RUF012 - the type is Jinja's

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    helpers: dict[str, Callable[..., object]] = {"raise_exception": _refuse, "strftime_now": _now}
    environment.globals.update(helpers)
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: object) -> NoReturn:
    raise PromptError(f"the chat template refuses the prompt: {_line(message)}")


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _line(message: object) -> str:
    return " ".join(str(message).split())[:300]
