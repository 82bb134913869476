"""The last step of ``CacheImportance``; those before are in plugins/attention_tiles.py.

The attention of R queries to N keys never exists: with 32 heads and R = N = 32,768 it would take
137 GB in fp32. It is computed twice, by tiles, and what lies between the steps are, in bytes, with
G = Hq / Hkv,

    8 B Hkv max(G R, 2048)     peak and total of every row's softmax
    4 B Hq N                   what each head gave each key

or 13 MB at that size. Each head is summed by programs of its own, B Hq N / 64 of them, which keeps
a GPU busy; adding the heads up is then a step for itself.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mean_over_heads(
    sums: tl.tensor,  # fp32 [B, Hq, N]
    importance: tl.tensor,  # fp32 [B, N]
    heads: tl.tensor,
    positions: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Grid: blocks of positions, B."""
    batch = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = position < positions
    total = tl.zeros([BLOCK], tl.float32)
    for head in range(heads):
        total += tl.load(sums + (batch * heads + head) * positions + position, there, other=0.0)
    tl.store(importance + batch * positions + position, total / heads, there)
