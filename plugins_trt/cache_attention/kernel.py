"""Kernels of attention, for two ops: what is valid is read, once for all query heads of a group.

Query heads of one key head stand under each other in memory, so they are ONE block of
M = Hq / Hkv * R rows: in decode a tile of keys and values serves them all. ``attend`` goes over the
keys that its rows see with a running softmax, so no row of attention is ever in memory. Where rows
are too few to keep a GPU busy, a row's keys are shared out among programs, evenly over those that
it sees, however long the cache is, and ``join`` puts the results together. There are no atomics:
a second run gives the same bits.

Products are of the data's own type with sums in fp32, the softmax is fp32. What no row of a tile
sees is not read; what one row of it does not see is replaced before the softmax.

Source: FlashAttention-2 (arXiv 2307.08691); Flash-Decoding (Dao et al., 2023) shares the keys out.
"""

# Triton reads upper case as compile-time constants, and mypy nothing of its types.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from lvlm.plugins_trt.plugins.attention_tiles import last_seen

# The interpreter holds bf16 as its bits, and would multiply those.
INTERPRETED = tl.constexpr(not isinstance(last_seen, triton.JITFunction))


@triton.jit
def attend(
    query: tl.tensor,  # T [B, Hkv, M, d]
    key: tl.tensor,  # T [B, Hkv, N, d]
    value: tl.tensor,  # T [B, Hkv, N, d]
    seen: tl.tensor,  # int64 [B], or slots [B, R]
    valid: tl.tensor,  # int64 [B], read with SLOTS
    output: tl.tensor,  # T [B, Hkv, M, d], written where there is one split
    mixed: tl.tensor,  # fp32 [B, Hkv, splits, M, d], written where there are several
    peaks: tl.tensor,  # fp32 [B, Hkv, splits, M]: largest logit seen in the split; -inf: none
    totals: tl.tensor,  # fp32 [B, Hkv, splits, M]: sum of exp(logit - peak)
    rows: tl.tensor,  # M
    indices: tl.tensor,  # R
    positions: tl.tensor,  # N
    width: tl.tensor,  # d, a multiple of 8
    splits: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SHORTEST: tl.constexpr,  # keys of a split, a multiple of 64
    SLOTS: tl.constexpr,
) -> None:
    """Row r sees as many keys as ``seen`` of its batch row says and r more; with SLOTS those up to
    its own slot, if that is below ``valid``, and there is one split, of which peaks and totals are
    written, too. Grid: blocks of rows times splits, Hkv, B.
    """
    tile: tl.constexpr = 32 if query.dtype.element_ty == tl.float32 else 64  # keys
    width = width // 8 * 8  # tells the compiler that rows are aligned
    # The last rows of a prompt see most: they begin first.
    block = tl.num_programs(0) // splits - 1 - tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    batch = tl.program_id(2).to(tl.int64)
    head = batch * tl.num_programs(1) + tl.program_id(1)
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    there = row < rows

    if SLOTS:
        ends = last_seen(seen, valid, batch, row, rows, indices, positions, True) + 1
        begins = ends * 0
    else:
        begins, ends = row_span(seen, batch, row, rows, indices, positions, window)
    end = tl.max(ends)
    begin = tl.min(tl.where(there, begins, positions)) // tile * tile
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), tile) * tile
    share = tl.maximum(share, SHORTEST)
    begin += split * share
    end = tl.minimum(begin + share, end)

    column, depth = tl.arange(0, tile), tl.arange(0, BLOCK_D)
    inside = depth < width
    at = (head * rows + row)[:, None] * width + depth[None, :]
    mask = there[:, None] & inside[None, :]
    q = tl.load(query + at, mask, other=0.0)
    key += head * positions * width
    value += head * positions * width
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(begin, end, tile):
        place = first + column
        read = (place < end)[:, None] & inside[None, :]
        entry = place[:, None] * width + depth[None, :]
        k = tl.load(key + entry, read, other=0.0)
        logits = product(q, tl.trans(k)) * scale
        sees = (place[None, :] >= begins[:, None]) & (place[None, :] < ends[:, None])
        logits = tl.where(sees, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: no inf - inf
        attention = tl.exp(logits - base[:, None])
        fade = tl.exp(peak - base)
        total = total * fade + tl.sum(attention, 1)
        v = tl.load(value + entry, read, other=0.0)
        new = product(attention.to(v.dtype), v)
        sums = sums * fade[:, None] + new
        peak = higher

    if splits == 1:
        divisor = tl.where(total == 0, 1.0, total)  # 0: saw nothing
        tl.store(output + at, (sums / divisor[:, None]).to(q.dtype), mask)
        if SLOTS:
            tl.store(peaks + head * rows + row, peak, there)
            tl.store(totals + head * rows + row, total, there)
    else:
        part = (head * splits + split) * rows + row
        tl.store(mixed + part[:, None] * width + depth[None, :], sums, mask)
        tl.store(peaks + part, peak, there)
        tl.store(totals + part, total, there)


@triton.jit
def product(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a @ b with sums in fp32; fp32 data is multiplied in fp32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:  # noqa: RET505  (for the compiler, which takes one of them)
        return tl.dot(a, b, input_precision="ieee" if a.dtype == tl.float32 else "tf32")


@triton.jit
def row_span(
    seen: tl.tensor,
    batch: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    indices: tl.tensor,
    positions: tl.tensor,
    window: tl.tensor,
) -> tl.tensor:
    """int32, the first key that each row sees and the one behind its last; 0, 0 beyond the rows."""
    own = tl.load(seen + batch) + row % indices
    own = tl.where(row < rows, tl.minimum(tl.maximum(own, 0), positions + window), 0).to(tl.int32)
    begin = tl.where(window > 0, tl.maximum(own - window, 0), 0)
    return begin, tl.minimum(own, positions)


@triton.jit
def join(
    mixed: tl.tensor,
    peaks: tl.tensor,
    totals: tl.tensor,
    output: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    splits: tl.tensor,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One row's output from those of its splits. Grid: M, Hkv, B."""
    width = width // 8 * 8
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    row = tl.program_id(0)
    split, depth = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    part = (head * splits + split) * rows + row
    there, inside = split < splits, depth < width
    each = tl.load(peaks + part, there, other=float("-inf"))
    peak = tl.max(each, 0)
    factor = tl.exp(each - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(tl.load(totals + part, there, other=0.0) * factor, 0)
    sums = tl.load(mixed + part[:, None] * width + depth[None, :],
                   there[:, None] & inside[None, :], other=0.0)  # fmt: skip
    sums = tl.sum(sums * factor[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(output + (head * rows + row) * width + depth, sums.to(output.dtype.element_ty), inside)
