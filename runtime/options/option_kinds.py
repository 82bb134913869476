"""Kinds of options: which values one takes, as what they are kept, how its flag is written.

Nothing here needs numpy, so that a command's ``--help`` is quick; numpy's scalars are taken all the
same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AnySet
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from lvlm.core.errors import ParameterError, shown

Flag = (
    Literal["integer", "number", "switch", "text", "texts", "ratios", "template", "ids", "biases"]
    | Literal["schema", "tools", "file"]
)


@dataclass(frozen=True)
class Option:
    """Values of an option: ``read`` gives the value as Python's own number, text or tuple, or
    raises ValueError, TypeError or OverflowError; ``wanted`` says in a message what is taken.
    ``flag`` is the kind of the command line's flag, ``metavar`` what its value is called."""

    wanted: str
    read: Callable[[object], Any]
    flag: Flag
    metavar: str | None
    help: str = ""


def integer(
    minimum: int, maximum: float = math.inf, wanted: str = "", help: str = "", metavar: str = "N"
) -> Option:
    def read(value: object) -> int:
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError
        if not minimum <= int(value) <= maximum:
            raise ValueError
        return int(value)

    highest = f"2**{math.log2(maximum):.0f}" if maximum > 10**12 else f"{maximum:,}"
    bounds = f"of {minimum} or more" if maximum == math.inf else f"from {minimum} to {highest}"
    return Option(wanted or f"an integer {bounds}", read, "integer", metavar, help)


def number(
    wanted: str, fits: Callable[[float], bool], help: str = "", metavar: str = "X"
) -> Option:
    def read(value: object) -> float:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError
        if not fits(taken := float(value)):  # NaN fails every comparison
            raise ValueError
        return taken

    return Option(wanted, read, "number", metavar, help)


def read_value(name: str, what: Option, value: object) -> Any:
    """A value as Python's own. Raises ParameterError, which names it."""
    value = plain(value)
    try:
        return what.read(value)
    except (TypeError, ValueError, OverflowError):
        raise ParameterError(f"{name} is {shown(value)}; give {what.wanted}") from None


def plain(value: object) -> object:
    """Python's own value for one of numpy's scalars, or torch's."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


SWITCH = Option("True or False", _switch, "switch", None)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return str(value)


TEXT = Option("a text", _text, "text", "TEXT")


def _model(value: object) -> str:
    if value != "model":
        raise ValueError
    return "model"


DEFAULTS = Option("'model' or None", _model, "text", "model")


def _texts(value: object) -> tuple[str, ...]:
    texts = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(t, str) and t for t in texts):
        raise TypeError
    return tuple(map(str, texts))


TEXTS = Option("a text, or a list of texts, none of them empty", _texts, "texts", "TEXT")


def _template(value: object) -> bool | str:
    if isinstance(value, str) and value.strip():
        return str(value)
    return _switch(value)


TEMPLATE = Option("True, False or a Jinja template's text", _template, "template", "FILE")
FRACTION = number("a number above 0 and up to 1", lambda x: 0 < x <= 1, metavar="G")


def _ratios(value: object) -> float | tuple[float, ...]:
    if isinstance(value, Real) and not isinstance(value, bool):
        return FRACTION.read(value)  # type: ignore[no-any-return]
    return tuple(FRACTION.read(one) for one in _several(value))


RATIOS = Option(
    "a number above 0 and up to 1, or a list of one per reduction", _ratios, "ratios", "R"
)
_TOKEN = integer(0)
_BIAS = number("from -100 to 100", lambda x: -100 <= x <= 100)


def _ids(value: object) -> tuple[int, ...]:
    return () if value is None else tuple(_TOKEN.read(one) for one in _several(value))


TOKEN_IDS = Option("a list of token ids", _ids, "ids", "N,…")


class TokenBiases(Mapping[int, float]):
    """A mapping that can be hashed, as options can."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._biases = dict(sorted(biases.items()))

    def __getitem__(self, token: int) -> float:
        return self._biases[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._biases)

    def __len__(self) -> int:
        return len(self._biases)

    def __hash__(self) -> int:
        return hash(tuple(self._biases.items()))

    def __repr__(self) -> str:
        return repr(self._biases)


def _biases(value: object) -> TokenBiases:
    if not isinstance(value, Mapping):
        raise TypeError
    return TokenBiases(
        {_TOKEN.read(plain(token)): _BIAS.read(plain(bias)) for token, bias in value.items()}
    )


TOKEN_BIASES = Option(
    "a dict from token ids to numbers from -100 to 100", _biases, "biases", "N=X,…"
)


def _several(value: object) -> list[object]:
    """Items in their order, each as Python's own."""
    if isinstance(value, str | bytes | Mapping | AnySet | bool):
        raise TypeError
    return [plain(one) for one in value]  # type: ignore[attr-defined]
