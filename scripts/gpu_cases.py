"""Calls of every op as large as real models make them, for gpu_check.py: Llama-7B (32 heads of 128,
4,096 wide) and Qwen2-7B (28 query and 4 key heads of 128, 3,584 wide), in half precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

HALF = 2  # bytes
LENGTHS = (608, 2_048, 8_192, 32_768)
TEXT = 32  # tokens beside the image's


@dataclass(frozen=True)
class ModelShape:
    name: str
    width: int
    heads: int
    key_heads: int
    head: int = 128


MODELS = (ModelShape("Llama-7B", 4_096, 32, 32), ModelShape("Qwen2-7B", 3_584, 28, 4))
SMALL, SHORT = ModelShape("small", 128, 2, 1), 64  # where nothing is measured


@dataclass(frozen=True)
class KernelCase:
    """traffic  bytes that are read and written at least
    matmuls  (m, k, n, how many) of the MatMuls that the op cannot do without"""

    op: str
    name: str
    inputs: tuple[torch.Tensor | None, ...]
    attributes: dict[str, Any]
    traffic: int
    matmuls: tuple[int, int, int, int] | None = None
    exact: bool = field(default=True)  # else near-ties may fall the other way
    attended: int = 0  # keys of torch's scaled_dot_product_attention that does the same, if any


def calls(ops: Sequence[str], longest: int, device: torch.device) -> Iterator[KernelCase]:
    """One at a time: the longest take gigabytes. Small ones without a GPU."""
    sizes = [(model, length) for model in MODELS for length in LENGTHS if length <= longest]
    if device.type == "cpu":
        sizes = [(SMALL, SHORT)]
    for op in ops:
        for model, length in sizes:
            yield from MAKERS[op](model, length, device)


def _random(device: torch.device, *shape: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(*shape, generator=generator, device=device, dtype=torch.float16)


def _image_id(length: int, device: torch.device) -> torch.Tensor:
    ids = torch.ones(1, length, dtype=torch.int64, device=device)
    ids[:, : TEXT // 2] = ids[:, -TEXT // 2 :] = 0
    return ids


def _token_importance(model: ModelShape, length: int, device: torch.device) -> Iterator[KernelCase]:
    key = _random(device, 1, model.key_heads, length, model.head)
    yield KernelCase(
        "TokenImportance",
        f"{model.name}, {length:,} keys, 1 query",
        (
            _random(device, 1, model.heads, 1, model.head),
            key,
            torch.tensor([[length - 1]], device=device),
            _image_id(length, device),
        ),
        {"scale": model.head**-0.5},
        traffic=key.numel() * HALF,
        matmuls=(model.heads // model.key_heads, model.head, length, model.key_heads),
    )


def _token_merge(model: ModelShape, length: int, device: torch.device) -> Iterator[KernelCase]:
    tokens = length - TEXT
    keep = round(0.35 * tokens)
    centres = max(1, keep // 10)
    counts = [torch.tensor([[n]], device=device) for n in (keep, centres)]
    slots = [torch.arange(n, device=device) for n in (keep, keep + TEXT, centres)]
    random = torch.Generator(device).manual_seed(1)
    yield KernelCase(
        "TokenMerge",
        f"{model.name}, {length:,} to {keep + TEXT:,} tokens",
        (
            _random(device, 1, length, model.width),
            torch.rand(1, length, generator=random, device=device),
            _image_id(length, device),
            torch.arange(length, device=device)[None],
            counts[0],
            slots[0],
            slots[1],
            counts[1],
            slots[2],
        ),
        {"merge": "recycle"},
        traffic=(length + keep + TEXT) * model.width * HALF,
        matmuls=(centres, model.width, tokens - keep, 1),
        exact=False,
    )


def _cache_importance(model: ModelShape, length: int, device: torch.device) -> Iterator[KernelCase]:
    key = _random(device, 1, model.key_heads, length, model.head)
    for rows in (32, length):
        slot = torch.arange(length - rows, length, device=device)[None]
        # Rows of a whole prompt see half of the keys, on the mean; logits are needed twice.
        seen = length if rows == 32 else length // 2
        yield KernelCase(
            "CacheImportance",
            f"{model.name}, {length:,} keys, {rows:,} queries",
            (
                _random(device, 1, model.heads, rows, model.head),
                key,
                slot,
                torch.tensor([length], device=device),
            ),
            {"scale": model.head**-0.5},
            traffic=(key.numel() + model.heads * rows * model.head) * HALF,
            matmuls=(rows, model.head, seen, 2 * model.heads),
        )


def _cache_attention(model: ModelShape, length: int, device: torch.device) -> Iterator[KernelCase]:
    """Decode over a cache that is full, over one that is so in its first quarter, and of 16 rows; a
    prompt over itself."""
    for batch, valid, rows in (
        (1, length, 1),
        (1, length // 4, 1),
        (16, length, 1),
        (1, length, length),
    ):
        if batch * length > LENGTHS[-1] // 2:  # half a gigabyte
            continue
        key, value = (_random(device, batch, model.key_heads, length, model.head) for _ in range(2))
        query = _random(device, batch, model.heads, rows, model.head)
        what = f"{batch} x {valid:,} of {length:,} keys" if rows == 1 else f"a prompt of {length:,}"
        seen = torch.full((batch,), valid - rows + 1, device=device)
        yield KernelCase(
            "CacheAttention",
            f"{model.name}, {what}",
            (query, key, value, seen),
            {"scale": model.head**-0.5, "window": 0},
            traffic=2 * (batch * model.key_heads * valid * model.head + query.numel()) * HALF,
            attended=valid,
        )


def _scored_attention(model: ModelShape, length: int, device: torch.device) -> Iterator[KernelCase]:
    """A prompt over itself: what CacheImportance and attention do apart."""
    key, value = (_random(device, 1, model.key_heads, length, model.head) for _ in range(2))
    query = _random(device, 1, model.heads, length, model.head)
    slots = torch.arange(length, device=device)[None]
    yield KernelCase(
        "ScoredAttention",
        f"{model.name}, a prompt of {length:,}",
        (query, key, value, slots, torch.tensor([length], device=device)),
        {"scale": model.head**-0.5},
        traffic=2 * (key.numel() + query.numel()) * HALF,
        attended=length,
    )


def _cache_compact(model: ModelShape, length: int, device: torch.device) -> Iterator[KernelCase]:
    key, value = (_random(device, 1, model.key_heads, length, model.head) for _ in range(2))
    budget = length // 5
    entry = 2 * model.key_heads * model.head * HALF
    random = torch.Generator(device).manual_seed(2)
    for mode in ("evict", "merge"):
        read = budget if mode == "evict" else length
        yield KernelCase(
            "CacheCompact",
            f"{model.name}, {mode}, {length:,} to {budget:,} entries",
            (
                key,
                value,
                torch.rand(1, length, generator=random, device=device),
                torch.tensor([length], device=device),
                torch.tensor([budget], device=device),
                torch.arange(budget, device=device),
            ),
            {"mode": mode},
            traffic=(read + budget) * entry,
        )


def _cache_update(model: ModelShape, length: int, device: torch.device) -> Iterator[KernelCase]:
    for batch in (1, 48):
        if batch * length > LENGTHS[-1]:
            continue
        update = _random(device, batch, model.key_heads, 1, model.head)
        yield KernelCase(
            "CacheUpdate",
            f"{model.name}, {batch} rows of {length:,} slots",
            (
                _random(device, batch, model.key_heads, length, model.head),
                update,
                torch.arange(batch, device=device) * 3,
            ),
            {},
            traffic=2 * update.numel() * HALF,
        )


MAKERS = {
    "CacheAttention": _cache_attention,
    "CacheCompact": _cache_compact,
    "CacheImportance": _cache_importance,
    "CacheUpdate": _cache_update,
    "ScoredAttention": _scored_attention,
    "TokenImportance": _token_importance,
    "TokenMerge": _token_merge,
}
