"""Every count of a call before it is run: tokens per layer, cache entries, answer lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvlm.core.errors import CapacityError, ParameterError, shown
from lvlm.runtime.bundle.manifest import Capacity, Manifest
from lvlm.runtime.kv.answer_limits import new_token_limit
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.image_tokens import PrefillPlan, keep_ratios, plan_prefill
from lvlm.runtime.options.checkpoint_defaults import filled_in
from lvlm.runtime.options.generation_config import GenerationConfig
from lvlm.runtime.options.generation_options import GenerationOptions, Keep
from lvlm.runtime.prompt.prompts import Prompt
from lvlm.runtime.prompt.shortened import shortened


@dataclass(frozen=True)
class PromptCounts:
    """The counts of B prompts in L layers.

    image_tokens  per row, of each image, those that get to the language model
    prefill       what enters each layer, and the inputs that say so
    kept          [L,B] int64: entries that prefill leaves in each cache
    limits        per row, new tokens that fit
    """

    image_tokens: list[list[int]]
    prefill: PrefillPlan
    budgets: Budgets
    kept: np.ndarray
    limits: list[int]

    def of_row(self, row: int) -> dict[str, Any]:
        """The counts of one prompt for Stats."""
        entries = self.prefill.entries[:, row]
        image_tokens = sum(self.image_tokens[row])
        text_tokens = int(entries[0]) - image_tokens
        return {
            "prompt_tokens": int(entries[0]),
            "image_tokens": image_tokens,
            "tokens_per_layer": tuple(entries.tolist()),
            "image_tokens_per_layer": tuple((entries - text_tokens).tolist()),
            "kept_per_layer": tuple(self.kept[:, row].tolist()),
        }


def read_at(manifest: Manifest, prompt: Prompt, keep: Keep | None) -> Prompt:
    """The prompt as the language model reads it: without the image tokens that a recipe drops at
    the encoder's output. Raises ParameterError."""
    if manifest.encoder is None:
        return prompt
    ratio = keep_ratios(manifest.shortenings, manifest.keep, keep)[0]
    return shortened(prompt, manifest.encoder, ratio)


def count_prompts(
    manifest: Manifest,
    prompts: Sequence[Prompt],
    keep: Keep | None,
    kv_keep: float | None,
    capacity: Capacity | None = None,
) -> PromptCounts:
    """Counts at the ratios of generate, by which the prompts are shortened (read_at).
    ``capacity``: what a row may take, the bundle's by default.

    Raises ParameterError, CapacityError: there is no room for one new token, or for all of an
    answer that is given.
    """
    images = [np.unique(p.image_id[p.image_id > 0], return_counts=True)[1] for p in prompts]
    image_tokens = [counts.tolist() for counts in images]
    text_tokens = [len(p.ids) - sum(v) for p, v in zip(prompts, image_tokens, strict=True)]
    prefill = plan_prefill(
        manifest.shortenings,
        keep_ratios(manifest.shortenings, manifest.keep, keep),
        manifest.text.layers,
        text_tokens,
        [[image.tokens for image in p.images] for p in prompts],
        [_tail(p.image_id) for p in prompts],
        image_tokens if manifest.encoder is not None else None,
    )
    budgets = Budgets.of(manifest.cache_policy, manifest.text.layers, kv_keep)
    limits = [
        new_token_limit(
            capacity or manifest.capacity,
            budgets,
            prefill.entries[:, row],
            text_tokens[row],
            len(image_tokens[row]),
            prompt.max_new_tokens,
        )
        for row, prompt in enumerate(prompts)
    ]
    for prompt, limit in zip(prompts, limits, strict=True):
        if prompt.forced is not None and limit < len(prompt.forced):
            raise CapacityError(
                f"the answer has {len(prompt.forced)} tokens, but there is room for {limit}; "
                "shorten it or the prompt, or export with more --max-text-len"
            )
    return PromptCounts(image_tokens, prefill, budgets, budgets.prompt(prefill.entries), limits)


def read_options(
    manifest: Manifest, base: GenerationOptions | None, given: Mapping[str, object]
) -> GenerationOptions:
    """The options of a call to a bundle; a wrong one is an error before any work.

    Raises ParameterError.
    """
    options = GenerationOptions.of(base, given)
    filled_in(options, GenerationConfig.of(manifest.generation))  # a mistake shows here
    vocab = manifest.text.vocab
    for name, ids in (
        ("stop_token_ids", options.stop_token_ids),
        ("logit_bias", options.logit_bias or ()),
    ):
        if ids and max(ids) >= vocab:
            raise ParameterError(
                f"{name} has token {shown(max(ids))}; the bundle's are those below {vocab:,}"
            )
    keep_ratios(manifest.shortenings, manifest.keep, options.keep)
    Budgets.of(manifest.cache_policy, manifest.text.layers, options.kv_keep)
    return options


def check_one_answer(options: GenerationOptions) -> None:
    """Raises ParameterError where a stream is asked for several answers."""
    if options.n > 1:
        raise ParameterError(
            f"n is {options.n}, but a stream has one answer; leave n out, or use generate or an "
            "engine's submit, whose handle and its others are streams each"
        )


def _tail(image_id: np.ndarray) -> int:
    """Tokens after the last image of a row; 0 without one: there is nothing to score."""
    images = np.flatnonzero(image_id > 0)
    return len(image_id) - int(images[-1]) - 1 if len(images) else 0
