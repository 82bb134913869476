"""The last step of ``TokenImportance``; those before are in plugins/attention_tiles.py.

Queries are few, often one, and what takes time is reading the keys of a long prompt. So the rows of
all heads that share a key head go through together, keys are read once in each of the two passes,
and it is keys that are shared out among programs in both. Between the steps lie, in bytes, with
G = Hq / Hkv,

    8 B Hkv max(G R, 512)      peak and total of every row's softmax, in each part of the keys
    4 B Hkv N                  what each group of heads gave each key
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mean_over_rows(
    sums: tl.tensor,  # fp32 [B, Hkv, N]
    query_index: tl.tensor,  # int64 [B, R]
    importance: tl.tensor,  # fp32 [B, N]
    heads: tl.tensor,  # Hq
    key_heads: tl.tensor,
    indices: tl.tensor,  # R
    positions: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Grid: blocks of positions, B. Divides by all heads and by the rows in use."""
    batch = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    used = tl.zeros([BLOCK], tl.int32)
    for first in range(0, indices, BLOCK):
        index = first + lane
        row = tl.load(query_index + batch * indices + index, index < indices, other=-1)
        used += (row >= 0).to(tl.int32)
    position = tl.program_id(0) * BLOCK + lane
    there = position < positions
    total = tl.zeros([BLOCK], tl.float32)
    for head in range(key_heads):
        total += tl.load(sums + (batch * key_heads + head) * positions + position, there, other=0.0)
    mean = total / (tl.maximum(tl.sum(used), 1) * heads)
    tl.store(importance + batch * positions + position, mean, there)
