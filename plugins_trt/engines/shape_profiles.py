"""Optimization profiles: how long every dynamic dimension of a bundle's graphs may be.

Every limit follows from the manifest's lengths, which bound what the runtime ever asks for. The
usual lengths, which kernels are chosen for, are those of one image and a short question at the
exported ratios; they must fit one another, as the lengths of a real call do, or the builder finds
a contradiction (no layer keeps more entries than the prompt has tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lvlm.core.errors import ParameterError
from lvlm.runtime.bundle.engine_sets import Range
from lvlm.runtime.bundle.manifest import Graph, Manifest
from lvlm.runtime.generate.loaded_graphs import TOKENS_AT_ONCE, UNITS_AT_ONCE
from lvlm.runtime.generate.pieces import max_at_once
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.image_tokens import ASKING, keep_ratios, kept, recycled, tokens_per_layer
from lvlm.runtime.kv.static_capacity import static_capacity

QUESTION = 32  # text tokens of a usual prompt
Profile = dict[str, Range]
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class EngineLimits:
    """batch       prompts at once
    max_prompt  tokens of a prompt, those of its images with them; None: all there is room for
    """

    batch: Range
    max_prompt: int | None = None


def parse_batch(text: str) -> Range:
    """A range from 4, 1..8 or 1..4..8. Raises ParameterError."""
    try:
        numbers = [int(part) for part in text.split("..")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or numbers != sorted(numbers) or min(numbers) < 1:
        raise ParameterError(
            f"--batch {text}: give LOW..HIGH or LOW..USUAL..HIGH, as 1..8 or 1..4..8"
        )
    return Range(numbers[0], numbers[len(numbers) // 2 if len(numbers) == 3 else 0], numbers[-1])


def profiles(manifest: Manifest, limits: EngineLimits) -> dict[str, Profile]:
    """Profiles by graph: the range of each of its dynamic dimensions; the cache's length is none of
    them. Raises ParameterError for limits that the bundle has no room for."""
    ranges = _ranges(manifest, limits)
    found: dict[str, Profile] = {}
    for name, graph in manifest.graphs.items():
        own = _encoded(manifest, limits) if name == "vision" else ranges
        found[name] = {d: own[d] for d in _dynamic(graph)}
    return found


def shapes(graph: Graph, profile: Mapping[str, Range], capacities: tuple[int, ...]) -> Shapes:
    """(min, opt, max) shape of every input of a graph, whose layers' caches have ``capacities``."""

    def extent(dim: int | str) -> tuple[int, int, int]:
        if isinstance(dim, int):
            return dim, dim, dim
        if (layer := _cache_layer(dim)) is not None:
            return (capacities[layer],) * 3
        return profile[dim].min, profile[dim].opt, profile[dim].max

    found: Shapes = {}
    for port in graph.inputs:
        extents = [extent(dim) for dim in port.dims]
        low, usual, high = (tuple(e[i] for e in extents) for i in range(3))
        found[port.name] = low, usual, high
    return found


def longest_prompt(manifest: Manifest) -> int:
    """Tokens of the longest prompt that a bundle has room for: one new token must fit as well."""
    capacity = manifest.capacity
    return capacity.max_text_len - 1 + capacity.max_images * manifest.images.tokens


def _ranges(manifest: Manifest, limits: EngineLimits) -> Profile:
    tokens, batch = manifest.images.tokens, limits.batch
    longest = _longest(manifest, limits)
    usual = min(longest, tokens + QUESTION)
    text = max(1, usual - tokens)
    shortenings, layers = manifest.shortenings, manifest.text.layers
    ratios = keep_ratios(shortenings, manifest.keep, None)
    entering = np.array(tokens_per_layer(shortenings, ratios, tokens, layers)) + text
    reductions = manifest.reductions
    ratios = ratios[len(shortenings) - len(reductions) :]
    stays = Budgets.of(manifest.cache_policy, layers, None).prompt(entering[:, None])[:, 0]
    max_images = batch.max * manifest.capacity.max_images
    capacities = static_capacity(manifest).per_layer
    at_once = max_at_once(manifest.images, TOKENS_AT_ONCE)
    ranges = {
        "batch": batch,
        "sequence": Range(1, usual, longest),
        "rows": Range(1, batch.opt * tokens, max_images * tokens),
        "images_per_row": Range(1, 1, manifest.capacity.max_images),
        "queries": Range(1, min(QUESTION, text, ASKING), min(ASKING, longest)),
        "tokens": Range(1, min(QUESTION, longest), min(at_once, longest)),
        "entries": Range(1, usual, max(capacities)),
    }
    for stage, (reduction, ratio) in enumerate(zip(reductions, ratios, strict=True)):
        count, centres = kept(tokens, ratio), reduction.recycle
        ranges[f"kept_{stage}"] = Range(1, count, tokens)
        ranges[f"centres_{stage}"] = Range(
            1, max(1, recycled(count, centres)), max(1, recycled(tokens, centres))
        )
        ranges[f"length_{stage}"] = Range(1, count + text, longest)
    for layer, capacity in enumerate(capacities):
        longest_cache = min(capacity, longest)
        entries = Range(1, min(int(stays[layer]), longest_cache), longest_cache)
        ranges[f"entries_{layer}"] = entries
        # Of extend: the entries behind which a session's tokens are read, and those it writes
        ranges[f"past_{layer}"] = Range(1, entries.opt, capacity)
        ranges[f"written_{layer}"] = Range(1, min(ranges["tokens"].opt, capacity), capacity)
    return ranges


def _encoded(manifest: Manifest, limits: EngineLimits) -> Profile:
    """The runtime encodes a few units at a time, however many images there are, or one image
    whose units belong together."""
    dims = manifest.images.max_dims
    if not manifest.images.independent_units:
        return {name: Range(1, count, count) for name, count in dims.items()}
    units = min(UNITS_AT_ONCE, limits.batch.max * manifest.capacity.max_images * dims["units"])
    return {"units": Range(1, min(limits.batch.opt * dims["units"], units), units)}


def _longest(manifest: Manifest, limits: EngineLimits) -> int:
    longest, shortest = longest_prompt(manifest), manifest.images.tokens + 1
    wanted = longest if limits.max_prompt is None else limits.max_prompt
    if wanted > longest:
        capacity = manifest.capacity
        raise ParameterError(
            f"--max-prompt {wanted}: the bundle has room for {longest} tokens (--max-text-len "
            f"{capacity.max_text_len}, --max-images {capacity.max_images}); give less or export "
            "with more"
        )
    if wanted < shortest:
        raise ParameterError(
            f"--max-prompt {wanted}: one image and a word take {shortest} tokens; give more"
        )
    return wanted


def _dynamic(graph: Graph) -> list[str]:
    """Names of the dimensions, in the order of the inputs, but the caches' lengths."""
    dims = dict.fromkeys(d for port in graph.inputs for d in port.dims if isinstance(d, str))
    return [dim for dim in dims if _cache_layer(dim) is None]


def _cache_layer(dim: str) -> int | None:
    name, _, layer = dim.rpartition("_")
    return int(layer) if name == "capacity" else None
