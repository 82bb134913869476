"""Tokens of a prompt, counted before anything is run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

from lvlm.runtime.bundle.manifest import Capacity, Manifest
from lvlm.runtime.generate.asks import Ask, Images, Question, Questions, Videos, read_asks
from lvlm.runtime.generate.call_plan import count_prompts, read_at
from lvlm.runtime.options.generation_options import GenerationOptions, OptionValues
from lvlm.runtime.prompt.prompts import PromptMaker

if TYPE_CHECKING:
    from typing import Unpack  # of Python 3.11


@dataclass(frozen=True)
class TokenCount:
    """Tokens of a prompt.

    Args:
        prompt_tokens: all that enter the language model.
        image_tokens: those of images and videos among them.
        kept_per_layer: of each layer, cache entries that it keeps of the prompt.
        new_tokens: how many an answer may have, whatever max_new_tokens is.
    """

    prompt_tokens: int
    image_tokens: int
    kept_per_layer: tuple[int, ...]
    new_tokens: int


class TokenCounting(ABC):
    """Preparer of prompts, which can count them."""

    @overload
    def count_tokens(  # type: ignore[overload-overlap]
        self,
        prompt: Question,
        images: Images | None = (),
        videos: Videos | None = (),
        options: GenerationOptions | None = None,
        **given: Unpack[OptionValues],
    ) -> TokenCount: ...

    @overload
    def count_tokens(
        self,
        prompt: Questions,
        images: Sequence[Images | None] | None = (),
        videos: Sequence[Videos | None] | None = (),
        options: GenerationOptions | None = None,
        **given: Unpack[OptionValues],
    ) -> list[TokenCount]: ...

    def count_tokens(self, prompt, images=(), videos=(), options=None, **given):  # type: ignore[no-untyped-def]
        """Count the tokens of one prompt, or of each of a list; no graph is run.

        Args:
            prompt, images, videos, options, given: as of generate.

        Returns:
            TokenCount, or a list of them in the order of the prompts.

        Raises:
            LvlmError: what generate raises of a prompt before it is run; CapacityError, too, where
                there is no room for one token of an answer.
        """
        asks, many = read_asks(prompt, images, videos)
        counts = self._counts(asks, options, given)
        return counts if many else counts[0]

    @abstractmethod
    def _counts(
        self, asks: Sequence[Ask], options: GenerationOptions | None, given: Mapping[str, object]
    ) -> list[TokenCount]:
        """The counts of each prompt, at these options."""


def count_asks(
    manifest: Manifest,
    prompts: PromptMaker,
    capacity: Capacity,
    asks: Sequence[Ask],
    options: GenerationOptions,
) -> list[TokenCount]:
    """Counts of each prompt alone, at the ratios of ``options``. Raises what generate raises of
    a prompt before it is run; CapacityError if there is no room for one token of an answer."""
    found = []
    for ask in asks:
        prompt = prompts.prepare(0, ask.prompt, ask.images, options, ask.videos)
        prompt = read_at(manifest, prompt, options.keep)
        prompt = replace(prompt, max_new_tokens=capacity.max_text_len)
        counts = count_prompts(manifest, [prompt], options.keep, options.kv_keep, capacity)
        row = counts.of_row(0)
        found.append(
            TokenCount(
                row["prompt_tokens"], row["image_tokens"], row["kept_per_layer"], counts.limits[0]
            )
        )
    return found
