"""Options of a call: the name, kind and range of each, said once.

``Model``, ``Engine`` and lvlm-run take the same ones. Nothing here needs numpy, so that a command's
``--help`` is quick; numpy's scalars are taken all the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from lvlm.core.discovery import nearest
from lvlm.core.errors import ParameterError, shown
from lvlm.runtime.options.option_kinds import (
    DEFAULTS,
    FRACTION,
    RATIOS,
    SWITCH,
    TEMPLATE,
    TEXT,
    TEXTS,
    TOKEN_BIASES,
    TOKEN_IDS,
    Option,
    integer,
    number,
    read_value,
)
from lvlm.runtime.options.structure_kinds import (
    CHOICE,
    GRAMMAR,
    REGEX,
    SCHEMA,
    Asked,
    asked_structure,
)
from lvlm.runtime.options.tool_kinds import TOOLS

if TYPE_CHECKING:
    from typing import Self, Unpack  # of Python 3.11

    import numpy as np

    Whole = int | np.integer[Any]
    Number = float | np.floating[Any] | np.integer[Any]

MAX_NEW_TOKENS = 256  # where nobody says how many
Keep = float | Sequence[float]  # a fraction, or one per reduction


def option(default: object, what: Option) -> Any:
    return field(default=default, metadata={"option": what})


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options of a call. Every value may be one of numpy's scalars; it is kept as Python's own.

    Args:
        defaults: "model": what is left open here is as the checkpoint's generation_config.json says
            it for transformers' generate, drawing included. None: as said below.
        max_new_tokens: the most tokens that an answer has. None: 256.
        min_new_tokens: tokens before which neither the model nor ``stop_token_ids`` may end the
            answer; a text of ``stop`` may. None: as the bundle says.
        temperature: 0 takes the likeliest token; above 0 logits are divided by it and a token is
            drawn. None: 0; what the bundle says of sampling counts above 0 only.
        top_k: draw from the k likeliest tokens, 0: from all. None: as the bundle says.
        top_p: draw from the fewest likeliest tokens that together reach this probability. None: as
            the bundle says.
        min_p: draw from tokens that are at least so many times as likely as the likeliest one, of
            those that top_k and top_p leave. None: from all.
        repetition_penalty: above 1 makes tokens of the prompt and the answer less likely, at
            temperature 0 too. None: as the bundle says.
        frequency_penalty: taken from a token's logit for each time that the answer has it already,
            at temperature 0 too; below 0 repeats more.
        presence_penalty: taken once from the logit of every token that the answer has already.
        logit_bias: what is added to the logits of tokens, by their ids, before all else: 100 comes
            close to a command, -100 to a ban.
        n: answers to each prompt, which is read once. The first one's ``others`` are the rest.
        seed: makes draws repeatable. Answer k (from 0 on) to prompt r of a list draws from
            seed + r * n + k, as a lone call does with that seed.
        stop: texts that end the answer and are no part of it; a special token's text ends it where
            that token comes.
        stop_token_ids: tokens that end the answer, with ``ignore_eos``, too; the last of
            ``token_ids`` is the one that came, the text does without it.
        ignore_eos: go on to max_new_tokens where the model ends its text.
        logprobs: how many of the likeliest tokens to tell of at every step, 0: of the chosen one
            only, None: of none.
        schema: the answer is JSON that fits this JSON schema, given as a dict or as its JSON text,
            which is how it is kept; {"type": "object"}: any object. At most one of schema, regex,
            choice and grammar is given.
        regex: the answer is a text that all of this regular expression matches.
        choice: the answer is one of these texts.
        grammar: the answer is a text of this Lark grammar, as llguidance takes it.
        tools: functions that the answer may call, in the form of OpenAI's API, as a list or as its
            JSON text, which is how it is kept. The chat template writes them into the prompt.
        keep: fraction of the image tokens to keep, or one per reduction. None: as exported.
        kv_keep: fraction of the cache entries to keep. None: as exported.
        chat_template: False takes the prompt as it stands, with its own image placeholders; a text
            is a Jinja template in place of the bundle's.
        system: text of the system message.
        frames: how many frames of each video. None: as the model's own processor takes.
        max_image_pixels: pixels that an image may have; 7 to 15 bytes each while it is decoded.
            None: 64 megapixels.

    Raises:
        ParameterError: a value is of another kind or out of its range; more than one structure.
    """

    defaults: Literal["model"] | None = option(
        None, replace(DEFAULTS, help="what is not given is as the checkpoint draws its tokens")
    )
    max_new_tokens: int | None = option(None, integer(1, help="length of the answer (default 256)"))
    min_new_tokens: int | None = option(
        None,
        integer(0, help="no end of text before so many (default: as the bundle says)"),
    )
    temperature: float | None = option(
        None,
        number(
            "0 or above",
            lambda x: 0 <= x < math.inf,
            "0 takes the likeliest token (default 0)",
            "T",
        ),
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
    min_p: float | None = option(
        None,
        number(
            "from 0 to 1",
            lambda x: 0 <= x <= 1,
            "draw from those at least P times as likely as the likeliest (default 0: all)",
            "P",
        ),
    )
    repetition_penalty: float | None = option(
        None,
        number(
            "from 0.01 to 100",
            lambda x: 0.01 <= x <= 100,
            "above 1 repeats less (default: as the bundle says)",
        ),
    )
    frequency_penalty: float = option(
        0.0,
        number(
            "from -2 to 2",
            lambda x: -2 <= x <= 2,
            "taken from a token's logit for each time the answer has it",
        ),
    )
    presence_penalty: float = option(
        0.0,
        number(
            "from -2 to 2", lambda x: -2 <= x <= 2, "taken from logits of tokens the answer has"
        ),
    )
    logit_bias: Mapping[int, float] | None = option(
        None, replace(TOKEN_BIASES, help="added to the logits of tokens N, as 5=-100,7=2.5")
    )
    n: int = option(1, integer(1, 128, help="answers to the prompt, each drawn for itself"))
    seed: int | None = option(None, integer(0, 2**128, help="makes draws repeatable"))
    stop: Sequence[str] = option((), replace(TEXTS, help="end the answer before TEXT; repeatable"))
    stop_token_ids: Sequence[int] = option(
        (), replace(TOKEN_IDS, help="end the answer at any of these tokens")
    )
    ignore_eos: bool = option(False, replace(SWITCH, help="go on to --max-new-tokens"))
    logprobs: int | None = option(
        None,
        integer(
            0,
            help="with --json: each token's logarithm of its probability, and the N likeliest ones",
        ),
    )
    schema: Mapping[str, Any] | str | None = option(None, SCHEMA)
    regex: str | None = option(None, REGEX)
    choice: Sequence[str] | None = option(None, CHOICE)
    grammar: str | None = option(None, GRAMMAR)
    tools: Sequence[Mapping[str, Any]] | str | None = option(None, TOOLS)
    keep: float | Sequence[float] | None = option(  # Keep
        None,
        replace(
            RATIOS,
            help="fraction of the image tokens to keep, or one per reduction, as 0.7,0.5,0.3 "
            "(default: as exported)",
        ),
    )
    kv_keep: float | None = option(
        None,
        replace(FRACTION, help="fraction of the cache entries to keep (default: as exported)"),
    )
    chat_template: bool | str = option(
        True, replace(TEMPLATE, help="a Jinja template in place of the bundle's")
    )
    system: str | None = option(None, replace(TEXT, help="system message"))
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
        asked_structure(vars(self))  # a mistake shows here

    @property
    def structure(self) -> Asked | None:
        """The one of schema, regex, choice and grammar that is given."""
        return asked_structure(vars(self))

    @classmethod
    def of(cls, base: GenerationOptions | None, given: Mapping[str, object]) -> Self:
        """Options with some of their values replaced.

        Args:
            base: the options. None: the defaults.
            given: values by name.

        Returns:
            GenerationOptions.

        Raises:
            ParameterError: a value cannot be used, or there is no option of that name.
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

    defaults: Literal["model"] | None
    max_new_tokens: Whole | None
    min_new_tokens: Whole | None
    temperature: Number | None
    top_k: Whole | None
    top_p: Number | None
    min_p: Number | None
    repetition_penalty: Number | None
    frequency_penalty: Number
    presence_penalty: Number
    logit_bias: Mapping[int, Number] | None
    n: Whole
    seed: Whole | None
    stop: Sequence[str]
    stop_token_ids: Sequence[Whole]
    ignore_eos: bool
    logprobs: Whole | None
    schema: Mapping[str, Any] | str | None
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None
    tools: Sequence[Mapping[str, Any]] | str | None
    keep: Number | Sequence[Number] | None
    kv_keep: Number | None
    chat_template: bool | str
    system: str | None
    frames: Whole | None
    max_image_pixels: Whole | None
