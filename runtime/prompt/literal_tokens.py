"""Token ids of text that is partly literal: special tokens written out in that part are text.

The whole is encoded at once, so that words, spaces and normalizers see what is before and behind
them. Where literal text becomes a special token, all is encoded again by a twin of the tokenizer
whose special tokens have names that nobody can write; the template's own are written with these.
"""

from __future__ import annotations

import json
import re
import secrets
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import tokenizers

from lvlm.core.errors import BundleError, PromptError, shown
from lvlm.runtime.prompt.literal_text import Literals

Encode = Callable[[tokenizers.Tokenizer, str, bool], tokenizers.Encoding]


class LiteralEncoder:
    """Encodes text that has hidden literals in it. Any thread may use it.

    ``special`` are ids and contents of the added tokens that literal text never becomes; ``encode``
    is the library's, with typed errors.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, special: Mapping[int, str], encode: Encode
    ) -> None:
        self._tokenizer, self._special, self._encode = tokenizer, dict(special), encode
        self._twin: _Twin | None = None

    def __call__(self, text: str, literals: Literals, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``. Raises BundleError if the tokenizer can have no twin, PromptError
        where literal text becomes a special token all the same."""
        runs = literals.runs(text)
        whole, literal = _joined(runs)
        encoded = self._encode(self._tokenizer, whole, add_special_tokens)
        if self._mistaken(encoded, whole, literal) is None:
            return list(encoded.ids)
        twin = self._twin
        if twin is None or twin.key in whole:
            self._twin = twin = _Twin(self._tokenizer, self._special, whole)
        whole, literal = _joined([(p if typed else twin.named(p), typed) for p, typed in runs])
        encoded = self._encode(twin.tokenizer, whole, add_special_tokens)
        if (found := self._mistaken(encoded, whole, literal, twin=True)) is not None:
            raise PromptError(
                f"{shown(found)} in a message cannot be told from the model's own token by this "
                "tokenizer; write it another way"
            )
        return list(encoded.ids)

    @cached_property
    def _unknown(self) -> int | None:
        """The token of what the vocabulary lacks."""
        model = json.loads(self._tokenizer.to_str())["model"]
        name: str | None = model.get("unk_token")
        by_index: int | None = model.get("unk_id")
        return by_index if name is None else self._tokenizer.token_to_id(name)

    def _mistaken(
        self, encoded: tokenizers.Encoding, whole: str, literal: bytes, twin: bool = False
    ) -> str | None:
        """Literal text that has become a special token, if any has. What the vocabulary lacks is
        the unknown token's, which is no mistake unless its name was written."""
        for number, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            if number not in self._special:
                continue
            found = whole[start:end]
            # White space beside a token may be part of it, whoever wrote it
            start, end = end - len(found.lstrip()), start + len(found.rstrip())
            if not any(literal[start:end]):
                continue
            if number == self._unknown and (twin or not _same(found, self._special[number])):
                continue
            return found
        return None


class _Twin:
    """A tokenizer whose ``special`` tokens have private names, with the same ids; ``key``, which
    is in all of these, is not in ``text``."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, special: Mapping[int, str], text: str
    ) -> None:
        data = json.loads(tokenizer.to_str())
        contents = [token["content"] for token in data["added_tokens"]]
        self.key = _key(tokenizer, [text, *contents])
        self._names = {t: f"{self.key}{n}{self.key}" for n, t in enumerate(special.values())}
        for token in data["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
        _rename(data["model"], self._names)
        # The longest of those that begin at a place, as the library finds them
        longest = sorted(contents, key=len, reverse=True)
        self._written = re.compile("|".join(map(re.escape, longest)))
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
        except Exception as error:  # the library raises bare Exception
            raise _no_twin(error) from None
        for number, content in special.items():
            if self.tokenizer.token_to_id(self._names[content]) != number:
                raise _no_twin(f"{content} would have another id")

    def named(self, text: str) -> str:
        """The template's text with its special tokens by their private names."""
        return self._written.sub(lambda found: self._names.get(found[0], found[0]), text)


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """In a model's part of a tokenizer.json: its words may be special tokens, too, and may be found
    as words."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(word, word): number for word, number in vocab.items()}
    else:
        model["vocab"] = [[names.get(word, word), *rest] for word, *rest in vocab]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = [p.split(" ") if isinstance(p, str) else p for p in model["merges"]]
        model["merges"] = [p for p in pairs if not names.keys() & {*p, "".join(p)}]


_ALPHABETS = (
    range(0xE000, 0xF8FF),
    range(0xA000, 0xA48C),
)  # private use; Yi, which all leave alone


def _key(tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> str:
    """Characters that the tokenizer's normalizer leaves alone, drawn so that nobody knows them."""
    texts = list(texts)
    for alphabet in _ALPHABETS:
        key = "".join(chr(secrets.choice(alphabet)) for _ in range(8))
        normalizer = tokenizer.normalizer
        if (normalizer is None or key in normalizer.normalize_str(f"a{key}a")) and not any(
            key in text for text in texts
        ):
            return key
    raise _no_twin("its normalizer changes every name")


def _joined(runs: Iterable[tuple[str, bool]]) -> tuple[str, bytes]:
    """A whole text, and for every character whether it is literal."""
    runs = list(runs)
    return "".join(p for p, _ in runs), b"".join(bytes([typed]) * len(p) for p, typed in runs)


def _same(text: str, token: str) -> bool:
    """True where the text is the token's name, as any normalizer may see it."""
    return _plain(token) in _plain(text)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _no_twin(reason: object) -> BundleError:
    line = " ".join(str(reason).split())[:200]
    return BundleError(
        f"the tokenizer cannot keep special tokens written in messages apart ({line}); leave them "
        "out of the messages"
    )
