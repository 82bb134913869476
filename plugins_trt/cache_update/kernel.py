"""The kernel of ``CacheUpdate``."""

# Triton reads upper case as compile-time constants, and mypy nothing of its types.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_entries(
    update: tl.tensor,
    index: tl.tensor,
    updated: tl.tensor,
    extent: tl.tensor,
    heads: tl.tensor,
    entries: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Row b's entries index[b] … index[b] + S - 1 of ``updated`` [B, H, C, d], the cache itself,
    become those of ``update`` [B, H, S, d]. What would lie outside the cache is left out.

    A program is BLOCK numbers of one row of the batch. extent C, heads H, entries S, width d.
    """
    row = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    line = number // width
    head, entry = line // entries, line % entries
    slot = tl.load(index + row) + entry
    inside = head < heads
    source = update + row * heads * entries * width + number
    place = ((row * heads + head) * extent + slot) * width + number % width
    new = tl.load(source, mask=inside, other=0.0)
    tl.store(updated + place, new, mask=inside & (slot >= 0) & (slot < extent))
