"""The room a bundle has: tokens of a prompt, cache entries of each layer, and their bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from lvlm.core.errors import ParameterError
from lvlm.export.export_options import ExportOptions
from lvlm.export.graphs.cache_entries import dtype_beside, held_width
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.recipes.recipe import Recipe
from lvlm.runtime.bundle.entry_form import ITEM_BYTES
from lvlm.runtime.bundle.manifest import Capacity, Images
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.cache import SCORES
from lvlm.runtime.kv.image_tokens import keep_ratios, max_entering, tokens_per_layer

LONGEST = 2**20  # tokens of a prompt, images and all, that a bundle has room for


@dataclass(frozen=True)
class CachePlan:
    """Tokens of one image that enter each layer, the capacities, and their bytes for one
    sequence."""

    image_tokens: list[int]
    capacity: Capacity
    bytes: int


def plan_cache(
    options: ExportOptions,
    recipe: Recipe,
    images: Images,
    language: LanguageModel,
    dtype: torch.dtype,
) -> CachePlan:
    """Entries per layer that the longest prompt and answer can ever occupy."""
    layers = len(language.attending)
    reductions, rule = recipe.shortenings(), recipe.cache_rule()
    ratios = keep_ratios(reductions, float(recipe.parameters().get("keep", 1.0)), None)
    entering = tokens_per_layer(reductions, ratios, images.tokens, layers)
    of_images = max_entering(reductions, ratios, images.tokens, layers, options.max_images)
    seen = np.array([options.max_text_len + n for n in of_images])
    budgets = Budgets.of(rule.cache_policy if rule else None, layers, None)
    per_layer = tuple(budgets.limit(seen, options.max_text_len - 1).tolist())
    width = held_width(language.head_dim, dtype)
    entries = 2 * language.kv_heads * sum(per_layer) * width
    beside = dtype_beside(dtype).itemsize
    states = sum(
        math.prod(sizes) * (4 if state.exact else beside)
        for state, sizes in zip(language.states, language.state_sizes, strict=True)
    )
    rings = language.heads * (rule.queries if rule else 0) * layers * language.head_dim
    scored = rule is not None and rule.cache_policy.received
    scores = sum(per_layer) * ITEM_BYTES[SCORES] if scored else 0
    return CachePlan(
        entering,
        Capacity(options.max_text_len, options.max_images, per_layer),
        entries * dtype.itemsize + rings * beside + states + scores,
    )


def check_length(
    options: ExportOptions, images: Images, language: LanguageModel, recipe: Recipe
) -> None:
    """ParameterError where prompts could be longer than the model is made for (images may go
    beyond: few prompts have as many, and as large ones, as there is room for), or than graphs with
    the recipe can do."""
    text, image_tokens = options.max_text_len, options.max_images * images.tokens
    if text > language.positions:
        raise ParameterError(
            f"--max-text-len {text}: this model is made for {language.positions:,} tokens; "
            f"give {language.positions} or less"
        )
    if language.longest is not None and language.longest < text + image_tokens:
        raise ParameterError(
            f"this model attends over {language.longest} tokens only; lower "
            f"{_lower(language.longest - image_tokens)}"
        )
    hiding = language.windowed(text + image_tokens)
    if hiding and not recipe.in_place:
        window = min(one.window for one in language.layers if one.window is not None)
        more = f" and {len(hiding) - 3} more" if len(hiding) > 3 else ""
        raise ParameterError(
            f"recipe {recipe.name} cannot do layers with a window (sliding_window {window}: layers "
            f"{', '.join(map(str, hiding[:3]))}{more}); take recipe none, or divprune "
            f"with kv=none, or lower {_lower(window - image_tokens)}"
        )
    max_images = (LONGEST - text) // images.tokens
    if options.max_images > max(1, max_images):
        raise ParameterError(
            f"--max-images {options.max_images}: with up to {images.tokens} tokens each, a bundle "
            f"has room for {max_images:,}; lower it, or --max-image-tokens"
        )


def _lower(room: int) -> str:
    """The flag to lower where ``room`` tokens of text are possible."""
    return f"--max-text-len to {room} or less" if room > 0 else "--max-images"
