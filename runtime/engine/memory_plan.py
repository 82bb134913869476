"""Memory plan of an engine: its slots and their bytes, from the manifest alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from lvlm.core.errors import ParameterError
from lvlm.runtime.bundle.manifest import Capacity, Manifest
from lvlm.runtime.generate.loaded_graphs import TOKENS_AT_ONCE, UNITS_AT_ONCE
from lvlm.runtime.generate.pieces import max_at_once
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.cache import cache_bytes
from lvlm.runtime.kv.image_tokens import keep_ratios, max_entering
from lvlm.runtime.options.generation_options import Keep
from lvlm.runtime.options.option_kinds import Option, integer, read_value

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
DEFAULT_SLOTS = 4
WIDEST_ROWS = 12


@dataclass(frozen=True)
class Memory:
    """Memory of an engine, in bytes.

    Args:
        weights: of all graphs, which share them.
        slot: cache of one request.
        slots: how many there are.
        workspace: estimate of what the graphs need at most while they run.
        images: limit of the kept image features.
    """

    weights: int
    slot: int
    slots: int
    workspace: int
    images: int

    @property
    def cache(self) -> int:
        """Bytes of all slots."""
        return self.slot * self.slots

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.weights + self.cache + self.workspace + self.images


def slot_capacity(
    manifest: Manifest,
    max_text_len: int | None,
    max_images: int | None,
    keep: Keep | None,
    kv_keep: float | None,
) -> Capacity:
    """Entries of one slot: the bundle's capacity, or less for shorter prompts or lower ratios.

    Raises ParameterError for more than the bundle was exported with.
    """
    given = manifest.capacity
    text = _within("max_text_len", max_text_len, given.max_text_len)
    images = _within("max_images", max_images, given.max_images)
    layers = manifest.text.layers
    shortenings = manifest.shortenings
    ratios = keep_ratios(shortenings, manifest.keep, keep)
    entering = max_entering(shortenings, ratios, manifest.images.tokens, layers, images)
    seen = np.array([text + n for n in entering])
    budgets = Budgets.of(manifest.cache_policy, layers, kv_keep)
    slots = np.minimum(budgets.limit(seen, text - 1), given.per_layer)
    return Capacity(text, images, tuple(slots.tolist()))


def _within(name: str, value: int | None, maximum: int) -> int:
    """``value``, or what the bundle was exported with."""
    wanted = f"1 to {maximum}, as the bundle was exported"
    return maximum if value is None else int(read_value(name, integer(1, maximum, wanted), value))


def plan_memory(
    manifest: Manifest,
    capacity: Capacity,
    slots: int | None,
    budget: int | str | None,
    images: int | str,
    chunk: int | None = None,
) -> Memory:
    """A plan with as many slots as fit into ``budget`` bytes, at most ``slots`` (4 where neither is
    given). ``chunk``: the most tokens of a prompt that are read at once; None: all of it.

    Raises ParameterError if there is room for none, or for fewer than ``slots``.
    """
    if slots is not None:
        slots = read_value("slots", integer(1), slots)
    weights = sum(w.bytes for w in manifest.weights.values())
    slot = cache_bytes(manifest, 1, capacity.per_layer)
    image_cache = byte_size("image_cache", images)
    wanted = DEFAULT_SLOTS if slots is None else slots

    def plan(count: int) -> Memory:
        needed = workspace(manifest, capacity, count, chunk)
        return Memory(weights, slot, count, needed, image_cache)

    if budget is None:
        return plan(wanted)
    room = byte_size("memory_budget", budget)

    if slots is None:
        slots = max(1, (room - plan(1).total) // (plan(2).total - plan(1).total) + 1)
    planned = plan(slots)
    if planned.total > room:
        raise ParameterError(
            f"memory_budget is {in_mb(room)}, but {slots} slot{'s' * (slots > 1)} of "
            f"{in_mb(slot)} need {in_mb(planned.total)} (weights {in_mb(weights)}, workspace "
            f"{in_mb(planned.workspace)}, images {in_mb(image_cache)}); give more, or a smaller "
            "max_text_len, max_images, kv_keep or image_cache"
        )
    return planned


def workspace(manifest: Manifest, capacity: Capacity, slots: int, chunk: int | None = None) -> int:
    """Bytes of activations: the longest prefill, its images, and a decode step of all slots, each
    of which keeps what it took once.

    ONNX Runtime's CPU kernels take attention in tiles, so it grows with the tokens and not with
    their square: by 8 to 10 rows of a graph's widest MatMul, on two shapes (docs/engine.md).
    """
    text = manifest.text

    def row(graph: str) -> int:
        """Bytes per token that are alive at once, fp32."""
        dims = [d for name in manifest.graphs[graph].weights for d in manifest.weights[name].dims]
        return 4 * WIDEST_ROWS * max([text.hidden, *(d for d in dims if d != text.vocab)])

    tokens = capacity.max_text_len + capacity.max_images * manifest.images.tokens
    images = manifest.images
    units = images.max_dims["units"]
    some = min(capacity.max_images * units, UNITS_AT_ONCE) if images.independent_units else units
    at_once = max(-(-some * images.tokens // units), images.patches)
    # Of one image: towers of so many patches take no more at a time
    seen = 4 * images.patch_heads * images.patches**2
    features = 4 * capacity.max_images * manifest.images.tokens * manifest.feature_width
    attention = 4 * text.heads * max(capacity.per_layer)
    step = slots * (row("decode") + attention + 8 * text.vocab)
    # Under a mask every layer holds all logits of a prompt over itself
    under_mask = 4 * text.heads * tokens if images.bidirectional or text.bidirectional else 0
    read = tokens * (row("prefill") + under_mask) if chunk is None else 0
    if "extend" in manifest.graphs:
        at_most = max_at_once(images, TOKENS_AT_ONCE if chunk is None else chunk)
        read += min(tokens, at_most) * (row("extend") + attention)
    return read + at_once * row("vision") + seen + features + step


def byte_size(name: str, value: int | str) -> int:
    """2GB, 512MiB or a number of bytes."""
    return int(read_value(name, SIZE, value))


def _size(value: object) -> int:
    if not isinstance(value, str):
        return int(integer(0).read(value))
    match = re.fullmatch(r"([\d.]+)\s*([a-z]*)", value.strip().lower(), re.ASCII)
    if not match or match[2] not in UNITS or not math.isfinite(number := float(match[1])):
        raise ValueError
    return int(number * UNITS[match[2]])


SIZE = Option("a size as 2GB, 512MiB or a number of bytes", _size, "text", "SIZE", "")


def in_mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
