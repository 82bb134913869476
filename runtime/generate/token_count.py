"""Tokens of a prompt, counted before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lvlm.runtime.bundle.manifest import Capacity, Manifest
from lvlm.runtime.generate.asks import Ask
from lvlm.runtime.generate.call_plan import count_prompts
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.prompts import PromptMaker


@dataclass(frozen=True)
class TokenCount:
    """Tokens of a prompt. ``prompt_tokens``: all of them, ``image_tokens``: those of images and
    videos; ``kept_per_layer``: cache entries that each layer keeps of it; ``new_tokens``: how many
    an answer may have, whatever max_new_tokens is."""

    prompt_tokens: int
    image_tokens: int
    kept_per_layer: tuple[int, ...]
    new_tokens: int


def count_asks(
    manifest: Manifest,
    prompts: PromptMaker,
    capacity: Capacity,
    asks: Sequence[Ask],
    options: GenerationOptions,
) -> list[TokenCount]:
    """Of each prompt alone, at the ratios of ``options``. Raises what generate raises of a prompt
    before it is run; CapacityError if there is no room for one token of an answer."""
    found = []
    for ask in asks:
        prompt = prompts.prepare(0, ask.prompt, ask.images, options, ask.videos)
        prompt = replace(prompt, max_new_tokens=capacity.max_text_len)
        counts = count_prompts(manifest, [prompt], options.keep, options.kv_keep, capacity)
        row = counts.of_row(0)
        found.append(
            TokenCount(
                row["prompt_tokens"], row["image_tokens"], row["kept_per_layer"], counts.limits[0]
            )
        )
    return found
