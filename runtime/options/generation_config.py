"""The part of a checkpoint's generation_config.json that changes which tokens are chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lvlm.core.errors import BundleError
from lvlm.core.typed_json import decode

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11


@dataclass(frozen=True)
class GenerationConfig:
    """The names and meanings are transformers'; the defaults change nothing.

    repetition_penalty     above 1 makes tokens of the prompt and of the answer less likely
    no_repeat_ngram_size   no run of so many tokens comes twice, the prompt counted in (0: off)
    bad_words_ids          runs of tokens that are never completed
    min_length             tokens, prompt and answer, before which the text may not end
    min_new_tokens         the same, of the answer alone
    suppress_tokens        never chosen
    begin_suppress_tokens  never chosen as the first token of an answer
    top_k, top_p           for a caller who asks for drawn tokens and does not say them
    sampling               the rest of what it says of drawing and lengths (do_sample, temperature,
                           max_new_tokens, …), for a caller who asks for defaults="model"; a top_k
                           that it turns off, too
    eos_ids                tokens that end a text; of the manifest's ``text``, not of this part
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    sampling: dict[str, Any] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        penalty = self.repetition_penalty
        if not 0.01 <= penalty <= 100:  # NaN fails, too
            raise BundleError(f"repetition_penalty is {penalty!r}; it must be from 0.01 to 100")
        for name in ("no_repeat_ngram_size", "min_length", "min_new_tokens", "top_k"):
            if getattr(self, name) < 0:
                raise BundleError(f"{name} is {getattr(self, name)!r}, but it must be 0 or above")

        if not 0 < self.top_p <= 1:
            raise BundleError(f"top_p is {self.top_p!r}, but it must be above 0 and at most 1")

    @classmethod
    def of(cls, stored: Mapping[str, Any], eos_ids: tuple[int, ...] = ()) -> Self:
        """The config of a manifest's ``generation``, which has what differs from the defaults.

        Raises BundleError for a field that is unknown or does not fit.
        """
        whole = cls().stored(everything=True) | dict(stored) | {"eos_ids": list(eos_ids)}
        return decode(cls, whole, "generation")

    def stored(self, *, everything: bool = False) -> dict[str, Any]:
        """The manifest's form: what differs from the defaults."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain.pop("eos_ids")
        defaults = {} if everything else vars(type(self)())
        return {
            name: _listed(value)
            for name, value in plain.items()
            if everything or value != defaults[name]
        }


def _listed(value: Any) -> Any:
    """Tuples as JSON has them."""
    return [_listed(item) for item in value] if isinstance(value, tuple) else value
