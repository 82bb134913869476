"""Text in and out: tokens, text as it streams, places of images in prompts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from lvlm.core.errors import BundleError, ParameterError, PromptError, shown
from lvlm.runtime.prompt.literal_tokens import LiteralEncoder

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11


class Tokenizer:
    """A bundle's ``tokenizer.json``. ``eos_ids`` end a text. Any thread may use it.

    Raises ``BundleError`` if the file is missing or is not a tokenizer.
    """

    def __init__(self, path: str | os.PathLike[str], eos_ids: Sequence[int]) -> None:
        name = os.fspath(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise _no_tokenizer(name, error) from None
        self._open(text, eos_ids, name)

    @classmethod
    def of_text(cls, text: str, eos_ids: Sequence[int]) -> Self:
        """A tokenizer from the content of a ``tokenizer.json``."""
        made = cls.__new__(cls)
        made._open(text, eos_ids, "tokenizer.json")
        return made

    def _open(self, text: str, eos_ids: Sequence[int], name: str) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise _no_tokenizer(name, error) from None
        if (processor := self._tokenizer.post_processor) is not None:
            _check_post_processor(json.loads(processor.__getstate__()), name)
        # A tokenizer.json may carry settings of a training run: a prompt must not be cut or padded
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {number: token.content for number, token in added.items() if token.special}
        self.eos_ids = frozenset(eos_ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written out in it count as special tokens.

        Raises ``PromptError`` for half a surrogate pair, as undecodable command line bytes become.
        """
        return list(_encoded(self._tokenizer, text, add_special_tokens).ids)

    def literal_encoder(self, placeholders: Iterable[str]) -> LiteralEncoder:
        """Encodes text that is partly literal; ``placeholders`` are never taken for the model's own
        there either, where they are added tokens."""
        wanted = frozenset(placeholders)
        named = {
            number: token.content
            for number, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special or token.content in wanted
        }
        return LiteralEncoder(self._tokenizer, named, _encoded)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, without special tokens and ids that the vocabulary lacks."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """Text of one token as it stands behind another, special tokens, too."""
        one = self._tokenizer.decode([token], skip_special_tokens=False)
        two = self._tokenizer.decode([token, token], skip_special_tokens=False)
        return two[len(one) :]

    def to_json(self) -> str:
        """The content of its ``tokenizer.json``, without what a training run has left there."""
        return self._tokenizer.to_str()

    def token_id(self, token: str) -> int:
        """Id of a token by its exact content. Raises ``BundleError`` if there is none."""
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise BundleError(f"the tokenizer has no token {token!r}; export the bundle again")
        return number

    def stop_ids(self, stops: Sequence[str]) -> dict[int, str]:
        """Ids of stop strings that are special tokens, which no text has in it, by their ids.

        Raises ``ParameterError`` for one that can never come: an empty one, or one that has a
        special token and more.
        """
        for stop in stops:
            if not stop:
                raise ParameterError("a stop string is empty; leave it out or give it text")
            inside = [text for text in self._special.values() if text in stop and text != stop]
            if inside and stop not in self._special.values():
                raise ParameterError(
                    f"stop {shown(stop)} has the special token {shown(inside[0])} and more; give "
                    "the token alone"
                )
        return {number: text for number, text in self._special.items() if text in stops}

    def pieces(self, text: str) -> list[tuple[str, int | None]]:
        """A text in pieces: special tokens that are written out in it with their ids, all else
        with None."""
        ids = {content: number for number, content in self._special.items()}
        longest = sorted(ids, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest))})", text) if ids else [text]
        return [(part, ids.get(part)) for part in parts if part]

    def visible_token(self, token_id: int) -> str | None:
        """The token as the vocabulary has it, or None if ``decode`` leaves it out."""
        return None if token_id in self._special else self._tokenizer.id_to_token(token_id)


def _encoded(library: tokenizers.Tokenizer, text: str, special: bool) -> tokenizers.Encoding:
    try:
        return library.encode(text, add_special_tokens=special)
    except TypeError:
        raise PromptError("the prompt is not valid Unicode; pass UTF-8 text") from None
    except BaseException as error:  # a panic of the library is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise _no_tokenizer("tokenizer.json", error) from None


def _no_tokenizer(name: str, reason: object) -> BundleError:
    return BundleError(f"{name} is not a tokenizer ({_line(reason)}); export the bundle again")


def _check_post_processor(processor: dict[str, Any], name: str) -> None:
    """Refuse what would make the library panic, which is no Exception, at the first prompt."""
    for inner in processor.get("processors", ()):
        _check_post_processor(inner, name)
    for piece in processor.get("single", ()):
        token = piece.get("SpecialToken", {}).get("id")
        if token is not None and token not in processor["special_tokens"]:
            raise _no_tokenizer(name, f"its post-processor names {token!r}, which it lacks")
        if piece.get("Sequence", {}).get("id", "A") != "A":
            raise _no_tokenizer(name, "its post-processor wants two texts")


class TextStream:
    """Turns one row's tokens into text, piece by piece. What it has returned never changes.

    The pieces and what ``finish`` returns, put together, are ``decode`` of all tokens, without the
    space ``lead`` where it begins with that, cut before the first stop string. First is the one
    that is complete first, and of two complete at once the longer. ``stopped`` is the stop string
    that came, if one did. One that is a special token's text is matched by that token, which is no
    part of the text. Raises ``ParameterError`` for an empty stop string and for one that has a
    special token and more in it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), lead: str = "") -> None:
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        self._stop_ids = tokenizer.stop_ids(self._stop)
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the last tokens, with enough of a past to be decoded right
        self._sent = 0  # characters of the window's text that are through
        self._lead = lead  # "" once the text has begun
        self._begun = ""  # text so short that it may be the lead's beginning
        self._held = ""  # final text that a stop string may begin in

    def push(self, token_id: int, *, last: bool = False) -> str:
        """The text that became final with this token; often empty."""
        piece = self._push(token_id)
        return piece + self.finish() if last else piece

    def _push(self, token_id: int) -> str:
        if not self.stopped and token_id in self._stop_ids:
            text = self.finish()  # a stop string that is text may end there, too, and was first
            self.stopped = self.stopped or self._stop_ids[token_id]
            return text
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
        if not self.stopped and self._begun:  # the whole text is part of a lead
            self._lead, begun = "", self._begun
            text += self._release(begun)
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
        if self._lead:
            fresh = self._begun + fresh
            if len(fresh) < len(self._lead) and self._lead.startswith(fresh):
                self._begun = fresh
                return ""
            fresh, self._lead, self._begun = fresh.removeprefix(self._lead), "", ""
        text = self._held + fresh
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            return text[:at]
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
    ids: list[int], image_token_id: int, images: Sequence[Sequence[int]], advice: str
) -> list[int]:
    """``ids`` with the m-th image placeholder replaced by the tokens of the m-th image.

    Raises ``PromptError``, which ends with ``advice``, unless there are as many placeholders as
    images.
    """
    places = ids.count(image_token_id)
    if places != len(images):
        raise misplaced("image", places, len(images), advice)
    remaining = iter(images)
    return [
        made for token in ids for made in (next(remaining) if token == image_token_id else [token])
    ]


def expand_text(text: str, token: str, images: Sequence[str], advice: str) -> str:
    """``text`` with the m-th ``token`` replaced by the text of the m-th image. Raises as
    ``expand_placeholders``."""
    parts = text.split(token)
    if len(parts) != 1 + len(images):
        raise misplaced("image", len(parts) - 1, len(images), advice)
    return parts[0] + "".join([image + part for image, part in zip(images, parts[1:], strict=True)])


def misplaced(what: str, places: int, given: int, advice: str) -> PromptError:
    """More or fewer placeholders than images or videos."""
    has = _plural(places, f"{what} placeholder")
    return PromptError(f"the prompt has {has} for {_plural(given, what)}; {advice}")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _line(message: object) -> str:
    return " ".join(str(message).split())[:300]
