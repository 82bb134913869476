"""The attention that keys receive, tile by tile: kernels that two ops share.

Fused attention throws its probabilities away, and the matrix of them all is too large to keep, so
they are computed again, twice. ``row_sums`` finds every query row's softmax denominator over the
keys it sees: the log-sum-exp, left as its two parts, peak and total, because a logarithm near 20
rounded to fp32 is already wrong by 1e-6. ``column_sums`` makes the logits once more and adds
exp(logit - peak) / total over the rows. Where rows are few, ``row_sums`` shares the keys out among
programs and ``join_splits`` puts their results together. There are no atomics: every sum has its
order, and a second run gives the same bits.

Query heads of one key head stand under each other in memory, so they are ONE block of
M = Hq / Hkv * R rows, and a tile of keys is read once for all of them.

Which keys a row sees comes from ``slots`` [B, R] int64, keys 0 ... slot (below 0: none), and
``valid``: with LENGTHS the length [B] int64 of each batch row, from which on a slot makes its query
unused; otherwise the id [B, N] int64 of every key, below 0 for padding. Queries are in any order.
Tiles that lie beyond the last key of their rows are left out, half of them in a causal prompt. What
is hidden is replaced, never multiplied by zero: NaN in unused queries and in padding goes nowhere,
NaN elsewhere reaches every key that its row sees.

Arithmetic is fp32 whatever the data. fp16 and bf16 fit into TF32 without loss, so tensor cores
multiply them exactly; but they cut their sums off where fp32 rounds, therefore no more than DEPTH
products are added there. fp32 data is multiplied in fp32.
"""

# Triton reads upper case as compile-time constants, and mypy nothing of its types.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_sums(
    query: tl.tensor,  # T [B, Hkv, M, d]
    key: tl.tensor,  # T [B, Hkv, N, d]
    slots: tl.tensor,  # int64 [B, R]
    valid: tl.tensor,  # int64 [B] or [B, N]
    peaks: tl.tensor,  # fp32 [B, Hkv, splits, M]: largest logit seen in the split; -inf: none
    totals: tl.tensor,  # fp32 [B, Hkv, splits, M]: sum of exp(logit - peak)
    key_heads: tl.tensor,
    rows: tl.tensor,  # M
    indices: tl.tensor,  # R
    positions: tl.tensor,  # N
    width: tl.tensor,  # d
    span: tl.tensor,  # keys of a split, a multiple of BLOCK_N
    scale: tl.tensor,
    softcap: tl.tensor,
    LENGTHS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ODD: tl.constexpr,  # 0 where d is a multiple of 8
    DEPTH: tl.constexpr,
) -> None:
    """Grid: blocks of rows, splits of the keys, B * Hkv."""
    if not ODD:
        width = width // 8 * 8  # tells the compiler that rows are aligned
    split, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_row = tl.program_id(0) * BLOCK_R
    row = first_row + tl.arange(0, BLOCK_R)
    batch = head // key_heads
    slot = last_seen(slots, valid, batch, row, rows, indices, positions, LENGTHS)
    query += (head * rows + first_row) * width
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    begin = split * span
    end = tl.minimum(begin + span, tl.max(slot) + 1)
    for first in range(begin, end, BLOCK_N):
        logits, seen = tile(query, key, valid, head, batch, slot, first, rows - first_row,
                            positions, width, scale, softcap, LENGTHS, BLOCK_R, BLOCK_N,
                            DEPTH)  # fmt: skip
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: no inf - inf
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        peak = higher
    place = (head * tl.num_programs(1) + split) * rows + row
    tl.store(peaks + place, peak, row < rows)
    tl.store(totals + place, total, row < rows)


@triton.jit
def join_splits(
    peaks: tl.tensor,
    totals: tl.tensor,
    rows: tl.tensor,
    splits: tl.tensor,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Peak and total of each row over all splits, [B, Hkv, M], in place of its first split's.

    Grid: blocks of rows, B * Hkv.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS)
    head = tl.program_id(1).to(tl.int64) * splits * rows
    place = head + split[:, None] * rows + row[None, :]
    there = (split < splits)[:, None] & (row < rows)[None, :]
    each = tl.load(peaks + place, there, other=float("-inf"))
    total = tl.load(totals + place, there, other=0.0)
    peak = tl.max(each, 0)
    total = tl.sum(total * tl.exp(each - peak[None, :]), 0)
    tl.store(peaks + head + row, peak, row < rows)
    tl.store(totals + head + row, total, row < rows)


@triton.jit
def column_sums(
    query: tl.tensor,
    key: tl.tensor,
    slots: tl.tensor,
    valid: tl.tensor,
    peaks: tl.tensor,
    totals: tl.tensor,
    sums: tl.tensor,  # fp32 [B, Hkv * shares, N]: attention received from a share of the rows
    key_heads: tl.tensor,
    rows: tl.tensor,
    indices: tl.tensor,
    positions: tl.tensor,
    width: tl.tensor,
    splits: tl.tensor,
    share: tl.tensor,  # rows of a share; shares * share = M
    scale: tl.tensor,
    softcap: tl.tensor,
    LENGTHS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ODD: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Grid: blocks of keys, Hkv * shares, B."""
    if not ODD:
        width = width // 8 * 8
    first, batch = tl.program_id(0) * BLOCK_N, tl.program_id(2).to(tl.int64)
    shares = tl.num_programs(1) // key_heads
    head = batch * key_heads + tl.program_id(1) // shares
    begin = tl.program_id(1) % shares * share
    received = tl.zeros([BLOCK_N], tl.float32)
    for first_row in range(begin, begin + share, BLOCK_R):
        row = first_row + tl.arange(0, BLOCK_R)
        slot = last_seen(slots, valid, batch, row, begin + share, indices, positions, LENGTHS)
        if tl.max(slot) >= first:
            peak = tl.load(peaks + head * splits * rows + row, row < rows, other=0.0)
            total = tl.load(totals + head * splits * rows + row, row < rows, other=1.0)
            logits, seen = tile(query + (head * rows + first_row) * width, key, valid, head, batch,
                                slot, first, rows - first_row, positions, width, scale, softcap,
                                LENGTHS, BLOCK_R, BLOCK_N, DEPTH)  # fmt: skip
            attention = tl.exp(logits - peak[:, None]) / total[:, None]
            received += tl.sum(tl.where(seen, attention, 0.0), 0)
    column = first + tl.arange(0, BLOCK_N)
    part = (batch * tl.num_programs(1) + tl.program_id(1)) * positions
    tl.store(sums + part + column, received, column < positions)


@triton.jit
def last_seen(
    slots: tl.tensor,
    valid: tl.tensor,
    batch: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    indices: tl.tensor,
    positions: tl.tensor,
    LENGTHS: tl.constexpr,
) -> tl.tensor:
    """int32, the last key that each row sees if it is valid; -1 for unused rows."""
    slot = tl.load(slots + batch * indices + row % indices, row < rows, other=-1)
    if LENGTHS:
        slot = tl.where(slot < tl.load(valid + batch), slot, -1)
    return tl.maximum(tl.minimum(slot, positions - 1), -1).to(tl.int32)


@triton.jit
def tile(
    query: tl.tensor,  # the tile's first row; ``rows`` are left from there
    key: tl.tensor,
    valid: tl.tensor,
    head: tl.tensor,
    batch: tl.tensor,
    slot: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    positions: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    LENGTHS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tl.tensor:
    """Logits [BLOCK_R, BLOCK_N] fp32 of the keys from ``first`` on, and which of them are seen."""
    row, column = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    key += (head * positions + first) * width
    precision: tl.constexpr = "ieee" if query.dtype.element_ty == tl.float32 else "tf32"
    logits = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        q = tl.load(query + row[:, None] * width + depth[None, :],
                    (row < rows)[:, None] & (depth < width)[None, :], other=0.0)  # fmt: skip
        k = tl.load(key + column[:, None] * width + depth[None, :],
                    (first + column < positions)[:, None] & (depth < width)[None, :],
                    other=0.0)  # fmt: skip
        part = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision=precision)
        logits += part * scale  # scaled here, or the compiler would join the sums
    if softcap > 0:  # tanh x = sign x (1 - 2 / (exp 2|x| + 1)), in which nothing overflows to NaN
        less = 2 / (tl.exp(2 * tl.abs(logits) / softcap) + 1)
        logits = tl.where(logits < 0, less - 1, 1 - less) * softcap
    seen = (first + column)[None, :] <= slot[:, None]
    if not LENGTHS:
        ids = tl.load(valid + batch * positions + first + column, first + column < positions,
                      other=-1)  # fmt: skip
        seen = seen & (ids >= 0)[None, :]
    return logits, seen
