"""Options of a call: the name, kind and range of each, said once.

``Model``, ``Engine`` and lvlm-run take the same ones. Nothing here needs numpy, so that a command's
``--help`` is quick; numpy's scalars are taken all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AnySet
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack

from lvlm.core.discovery import nearest
from lvlm.core.errors import ParameterError, shown

if TYPE_CHECKING:
    import numpy as np

    Whole = int | np.integer[Any]
    Number = float | np.floating[Any] | np.integer[Any]

Keep = float | Sequence[float]  # a fraction, or one per reduction
Flag = Literal["integer", "number", "switch", "text", "texts", "ratios", "template"]


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


def _texts(value: object) -> tuple[str, ...]:
    texts = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(t, str) and t for t in texts):
        raise TypeError
    return tuple(map(str, texts))


def _template(value: object) -> bool | str:
    if isinstance(value, str) and value.strip():
        return str(value)
    return _switch(value)


def _ratios(value: object) -> float | tuple[float, ...]:
    if isinstance(value, str | bytes | Mapping | AnySet | bool):
        raise TypeError
    if isinstance(value, Real):
        return _fraction.read(value)  # type: ignore[no-any-return]
    return tuple(_fraction.read(plain(one)) for one in value)  # type: ignore[attr-defined]


_fraction = number(
    "a number above 0 and up to 1",
    lambda x: 0 < x <= 1,
    "fraction of the cache entries to keep (default: as exported)",
    "G",
)


def option(default: object, what: Option) -> Any:
    return field(default=default, metadata={"option": what})


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options of a call. Every value may be one of numpy's scalars; it is kept as Python's own.

    Args:
        max_new_tokens: the most tokens that an answer has.
        temperature: 0 takes the likeliest token; above 0 logits are divided by it and a token is
            drawn. Not taken from the bundle: what it says of sampling counts above 0 only.
        top_k: draw from the k likeliest tokens, 0: from all. None: as the bundle says.
        top_p: draw from the fewest likeliest tokens that together reach this probability. None: as
            the bundle says.
        repetition_penalty: above 1 makes tokens of the prompt and the answer less likely, at
            temperature 0 too. None: as the bundle says.
        seed: makes draws repeatable. Row r of a list of prompts draws from seed + r.
        stop: texts that end the answer and are no part of it; a special token's text ends it where
            that token comes.
        ignore_eos: go on to max_new_tokens where the model ends its text.
        logprobs: how many of the likeliest tokens to tell of at every step, 0: of the chosen one
            only, None: of none.
        keep: fraction of the image tokens to keep, or one per reduction. None: as exported.
        kv_keep: fraction of the cache entries to keep. None: as exported.
        chat_template: False takes the prompt as it stands, with its own image placeholders; a text
            is a Jinja template in place of the bundle's.
        system: text of the system message.
        frames: how many frames of each video. None: as the model's own processor takes.
        max_image_pixels: pixels that an image may have; 7 to 15 bytes each while it is decoded.
            None: 64 megapixels.

    Raises ParameterError for a value of another kind or out of its range.
    """

    max_new_tokens: int = option(256, integer(1, help="length of the answer"))
    temperature: float = option(
        0.0,
        number("0 or above", lambda x: 0 <= x < math.inf, "0 takes the likeliest token", "T"),
    )
    top_k: int | None = option(
        None,
        integer(
            0, help="draw from the K likeliest, 0: all (default: as the bundle says)", metavar="K"
        ),
    )
    top_p: float | None = option(
        None,
        number(
            "above 0 and at most 1",
            lambda x: 0 < x <= 1,
            "draw from the likeliest, up to P (default: as the bundle says)",
            "P",
        ),
    )
    repetition_penalty: float | None = option(
        None,
        number(
            "from 0.01 to 100",
            lambda x: 0.01 <= x <= 100,
            "above 1 repeats less (default: as the bundle says)",
            "X",
        ),
    )
    seed: int | None = option(None, integer(0, 2**128, help="makes draws repeatable"))
    stop: Sequence[str] = option(
        (),
        Option(
            "a text, or a list of texts, none of them empty",
            _texts,
            "texts",
            "TEXT",
            "end the answer before TEXT; repeatable",
        ),
    )
    ignore_eos: bool = option(False, replace(SWITCH, help="go on to --max-new-tokens"))
    logprobs: int | None = option(
        None,
        integer(
            0,
            help="with --json: each token's logarithm of its probability, and the N likeliest ones",
        ),
    )
    keep: float | Sequence[float] | None = option(  # Keep
        None,
        Option(
            "a number above 0 and up to 1, or a list of one per reduction",
            _ratios,
            "ratios",
            "R",
            "fraction of the image tokens to keep, or one per reduction, as 0.7,0.5,0.3 "
            "(default: as exported)",
        ),
    )
    kv_keep: float | None = option(None, _fraction)
    chat_template: bool | str = option(
        True,
        Option(
            "True, False or a Jinja template's text",
            _template,
            "template",
            "FILE",
            "a Jinja template in place of the bundle's",
        ),
    )
    system: str | None = option(None, Option("a text", _text, "text", "TEXT", "system message"))
    frames: int | None = option(
        None, integer(1, help="frames of each video (default: the model's choice)")
    )
    max_image_pixels: int | None = option(
        None, integer(1, 178_956_970, help="pixels that an image may have (default: 64 million)")
    )

    if TYPE_CHECKING:  # what is given has more types than what is kept

        def __init__(self, **given: Unpack[OptionValues]) -> None: ...

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None or each.default is not None:
                taken = read_value(each.name, each.metadata["option"], value)
                object.__setattr__(self, each.name, taken)

    @classmethod
    def of(cls, base: GenerationOptions | None, given: Mapping[str, object]) -> Self:
        """``base`` (None: the defaults) with the values that are ``given`` by name.

        Raises ParameterError, for an unknown name too.
        """
        known = [each.name for each in fields(cls)]
        unknown = set(given) - set(known)
        if unknown:
            raise nearest("option", min(unknown), known)
        if base is None:
            return cls(**given)  # type: ignore[arg-type]
        if not isinstance(base, cls):
            raise ParameterError(
                f"options is {shown(base)}; give lvlm.GenerationOptions(…), or each option by name"
            )
        return replace(base, **given)  # type: ignore[arg-type]


class OptionValues(TypedDict, total=False):
    """GenerationOptions by name, as calls take them: the same names, and numpy's scalars, too."""

    max_new_tokens: Whole
    temperature: Number
    top_k: Whole | None
    top_p: Number | None
    repetition_penalty: Number | None
    seed: Whole | None
    stop: Sequence[str]
    ignore_eos: bool
    logprobs: Whole | None
    keep: Number | Sequence[Number] | None
    kv_keep: Number | None
    chat_template: bool | str
    system: str | None
    frames: Whole | None
    max_image_pixels: Whole | None
