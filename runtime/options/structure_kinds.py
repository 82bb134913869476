"""Kinds of options that give an answer its structure, as what they are kept and how long they may
be.

Nothing here needs numpy or llguidance: what they mean shows when a request is prepared
(sampling/structure_compiler.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeAlias

from lvlm.core.errors import ParameterError
from lvlm.runtime.options.option_kinds import Option

LONGEST_SCHEMA = 1_000_000  # characters
LONGEST_TEXT = 100_000  # of a regular expression, a grammar, or all choices together
MAX_CHOICES = 10_000

Kind: TypeAlias = Literal["schema", "regex", "choice", "grammar"]
KINDS: tuple[Kind, ...] = ("schema", "regex", "choice", "grammar")


@dataclass(frozen=True)
class Asked:
    """A structure as it is asked for: a JSON schema's text, a regular expression, some texts or a
    grammar."""

    kind: Kind
    value: str | tuple[str, ...]


def asked_structure(values: Mapping[str, Any]) -> Asked | None:
    """The structure that is asked for among the options, if one is. Raises ParameterError where
    there are several, or one that could not end the answer."""
    given = [kind for kind in KINDS if values[kind] is not None]
    if not given:
        return None
    if len(given) > 1:
        names = " and ".join((", ".join(given[:-1]), given[-1]))
        raise ParameterError(f"{names} are given, but an answer has one structure; give one")
    if values["ignore_eos"]:
        raise ParameterError(
            f"ignore_eos does not go with {given[0]}: such an answer ends where its structure is "
            "complete; leave one of them out"
        )
    return Asked(given[0], values[given[0]])


class SchemaText(str):
    """JSON text of a schema that has been read: options are copied, and it may be long."""


def _schema(value: object) -> SchemaText:
    if isinstance(value, SchemaText):
        return value
    if isinstance(value, str):
        if len(value) > LONGEST_SCHEMA:
            raise ValueError
        value = loaded_json(value)
    if not isinstance(value, Mapping):
        raise TypeError
    try:
        text = json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise ValueError from None
    if len(text) > LONGEST_SCHEMA or not writes(text):
        raise ValueError
    return SchemaText(text)


def loaded_json(text: str) -> object:
    """Value of JSON text. Raises ValueError."""
    try:
        return json.loads(text, parse_constant=_no_json)
    except RecursionError:
        raise ValueError from None


def _no_json(constant: str) -> NoReturn:
    """NaN and Infinity, which Python would take."""
    raise ValueError(constant)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    if not 0 < len(value) <= LONGEST_TEXT or not writes(value):
        raise ValueError
    return str(value)


def _choice(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError
    texts = tuple(_text(text) for text in value)
    if not 0 < len(texts) <= MAX_CHOICES or sum(map(len, texts)) > LONGEST_TEXT:
        raise ValueError
    return tuple(dict.fromkeys(texts))


def writes(text: str) -> bool:
    """True where it is Unicode: half a surrogate pair is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


SCHEMA = Option(
    f"a JSON schema, as a dict or its JSON text, of up to {LONGEST_SCHEMA:,} characters",
    _schema,
    "schema",
    "SCHEMA",
    'answer in JSON that fits this schema: a file, or its text, as \'{"type": "object"}\'',
)
REGEX = Option(
    f"a regular expression of 1 to {LONGEST_TEXT:,} characters",
    _text,
    "text",
    "REGEX",
    "answer with a text that all of this regular expression matches",
)
CHOICE = Option(
    f"a list of texts, up to {MAX_CHOICES:,}, none empty, {LONGEST_TEXT:,} characters together",
    _choice,
    "texts",
    "TEXT",
    "answer with one of the TEXTs that are given so; repeatable",
)
GRAMMAR = Option(
    f"a Lark grammar's text, of 1 to {LONGEST_TEXT:,} characters",
    _text,
    "file",
    "FILE",
    "answer with a text of this Lark grammar, as llguidance takes it",
)
