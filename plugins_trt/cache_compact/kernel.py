"""Kernels of ``CacheCompact``: which positions stay, in what slots, and moving their entries.

A position's rank is counted, not sorted for: any number may stay, ties need no care, every program
is independent. O(N²) comparisons are little beside the attention that gave the importance.
"""

# Triton reads upper case as compile-time constants, and mypy nothing of its types.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(0x7F800000)  # the bits of fp32's; those of NaN are more
NOBODY = tl.constexpr(-0x7FFFFFFF)  # below every score's number by more than one


@triton.jit
def order_scores(
    importance: tl.tensor,  # fp32 [B, N]
    length: tl.tensor,  # int64 [B]
    order: tl.tensor,  # int32 [B, N], not written at padding
    positions: tl.tensor,  # N
    sinks: tl.tensor,
    recent: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Integers in the order of the scores: not finite is 0, protected the largest. -0 equals
    0, no denormal number is lost. Grid: blocks of positions, B."""
    row = tl.program_id(1).to(tl.int64)
    valid = tl.minimum(tl.load(length + row), positions).to(tl.int32)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < valid
    score = tl.load(importance + row * positions + i, mask=there, other=0.0)
    bits = score.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    magnitude = tl.where(magnitude < INFINITY, magnitude, 0)
    number = tl.where(bits < 0, -magnitude, magnitude)
    number = tl.where((i < sinks) | (i >= valid - recent), 0x7FFFFFFF, number)
    tl.store(order + row * positions + i, number, mask=there)


@triton.jit
def mark_survivors(
    order: tl.tensor,  # int32 [B, N]
    length: tl.tensor,  # int64 [B]
    budget: tl.tensor,  # int64 [B]
    stays: tl.tensor,  # int8 [B, N], not written at padding
    positions: tl.tensor,  # N
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,  # a multiple of BLOCK_I
) -> None:
    """Mark positions before which fewer than the budget of valid ones go.

    Grid: blocks of positions i, B. A program compares its block with all of the row, by blocks j.
    """
    row = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * BLOCK_I
    valid = tl.minimum(tl.load(length + row), positions).to(tl.int32)
    wanted = tl.load(budget + row)
    order += row * positions
    i = begin + tl.arange(0, BLOCK_I)
    lane = tl.arange(0, BLOCK_J)
    mine = tl.load(order + i, mask=i < valid, other=0)
    ahead = tl.zeros([BLOCK_I, BLOCK_J], tl.int32)
    # Where all stay, or the block is padding, nobody needs a rank.
    counted = tl.where((wanted < valid) & (begin < valid), valid, 0)
    for start in range(0, counted, BLOCK_J):
        j = start + lane
        other = tl.load(order + j, mask=j < valid, other=NOBODY)
        limit = mine - (start + BLOCK_J <= begin).to(tl.int32)  # of equal ones the earlier is ahead
        ahead += (other[None, :] > limit[:, None]).to(tl.int32)
    j = begin // BLOCK_J * BLOCK_J + lane  # the block that the program's own lies in
    other = tl.load(order + j, mask=j < valid, other=NOBODY)
    ties = (other[None, :] == mine[:, None]) & (j[None, :] < i[:, None])
    rank = tl.sum(ahead + ties.to(tl.int32), 1)
    tl.store(stays + row * positions + i, (rank < wanted).to(tl.int8), mask=i < valid)


@triton.jit
def list_survivors(
    importance: tl.tensor,  # fp32 [B, N]
    length: tl.tensor,  # int64 [B]
    budget: tl.tensor,  # int64 [B]
    stays: tl.tensor,  # int8 [B, N]
    kept_index: tl.tensor,  # int64 [B, K]: the positions that stay, rising, then -1
    kept: tl.tensor,  # int64 [B]: the budget, or -1 where importance is not finite
    positions: tl.tensor,  # N
    slots: tl.tensor,  # K
    BLOCK: tl.constexpr,
) -> None:
    """Grid: B. The blocks of a row come in order; how many stay before them is carried along."""
    row = tl.program_id(0).to(tl.int64)
    valid = tl.minimum(tl.load(length + row), positions).to(tl.int32)
    importance += row * positions
    stays += row * positions
    kept_index += row * slots
    lane = tl.arange(0, BLOCK)
    found = 0
    wrong = 0
    for start in range(0, valid, BLOCK):
        position = start + lane
        there = position < valid
        stay = tl.load(stays + position, mask=there, other=0).to(tl.int32)
        slot = found + tl.cumsum(stay, 0) - stay
        tl.store(kept_index + slot, position.to(tl.int64), mask=(stay > 0) & (slot < slots))
        found += tl.sum(stay, 0)
        bits = tl.load(importance + position, mask=there, other=0.0).to(tl.int32, bitcast=True)
        wrong += tl.sum(((bits & 0x7FFFFFFF) >= INFINITY).to(tl.int32), 0)
    for start in range(0, slots, BLOCK):
        slot = start + lane
        nothing = tl.full([BLOCK], -1, tl.int64)
        tl.store(kept_index + slot, nothing, mask=(slot >= found) & (slot < slots))
    tl.store(kept + row, tl.where(wrong > 0, -1, tl.load(budget + row)))


@triton.jit
def copy_survivors(
    states: tl.tensor,  # T [B, H, N, d]
    kept_index: tl.tensor,  # int64 [B, K]
    compact: tl.tensor,  # T [B, H, K, d]: the rows at kept_index, 0 at -1
    positions: tl.tensor,  # N
    slots: tl.tensor,  # K
    width: tl.tensor,  # d
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Grid: blocks of slots, H, B."""
    row = tl.program_id(2).to(tl.int64)
    head = row * tl.num_programs(1) + tl.program_id(1)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    index = tl.load(kept_index + row * slots + slot, mask=slot < slots, other=-1)
    source, target = head * positions, head * slots + slot
    if width % 8 == 0:  # then the compiler sees that rows are aligned: wide loads and stores
        pitch = width // 8 * 8
        copy(states, compact, source, target, index, slot < slots, pitch, BLOCK_D)
    else:
        copy(states, compact, source, target, index, slot < slots, width, BLOCK_D)


@triton.jit
def copy(
    states: tl.tensor,
    compact: tl.tensor,
    source: tl.tensor,  # row of states that is the head's first
    target: tl.tensor,  # [S]: row of compact of each slot
    index: tl.tensor,  # [S]: position, or -1
    there: tl.tensor,  # [S]
    pitch: tl.tensor,
    BLOCK_D: tl.constexpr,
) -> None:
    """Bit by bit."""
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = column < pitch
    from_row = (source + index)[:, None] * pitch + column
    rows = tl.load(states + from_row, mask=(index >= 0)[:, None] & inside, other=0.0)
    tl.store(compact + target[:, None] * pitch + column, rows, mask=there[:, None] & inside)


@triton.jit
def merge_into_survivors(
    states: tl.tensor,  # T [B, H, N, d]
    length: tl.tensor,  # int64 [B]
    kept_index: tl.tensor,  # int64 [B, K]
    compact: tl.tensor,  # T [B, H, K, d]: means of what is nearest to each of them, 0 at -1
    positions: tl.tensor,  # N
    slots: tl.tensor,  # K
    width: tl.tensor,  # d
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Grid: blocks of slots, H, B.

    What is nearest to a slot's own position is a run of positions, up to halfway to the neighbours
    (a tie goes left). ROWS of each run are read at a time; a program has few slots, since the
    longest run decides how long it takes. No sum crosses programs, so nothing varies.
    """
    row = tl.program_id(2).to(tl.int64)
    head = row * tl.num_programs(1) + tl.program_id(1)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    kept_index += row * slots
    index = tl.load(kept_index + slot, mask=slot < slots, other=-1)
    left = tl.load(kept_index + slot - 1, mask=(slot > 0) & (slot < slots), other=-1)
    right = tl.load(kept_index + slot + 1, mask=slot + 1 < slots, other=-1)
    valid = tl.minimum(tl.load(length + row), positions)
    begin = tl.where(slot > 0, (left + index) // 2 + 1, 0)
    end = tl.where(right >= 0, (index + right) // 2 + 1, valid)
    count = tl.where(index >= 0, end - begin, 0).to(tl.int32)
    source, target, there = head * positions + begin, head * slots + slot, slot < slots
    if width % 8 == 0:
        pitch = width // 8 * 8
        merge(states, compact, source, target, count, there, pitch, SLOTS, ROWS, BLOCK_D)
    else:
        merge(states, compact, source, target, count, there, width, SLOTS, ROWS, BLOCK_D)


@triton.jit
def merge(
    states: tl.tensor,
    compact: tl.tensor,
    source: tl.tensor,  # [S]: row of states where the run begins
    target: tl.tensor,  # [S]: row of compact
    count: tl.tensor,  # [S]: length of the run, 0: zeros
    there: tl.tensor,  # [S]
    pitch: tl.tensor,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """fp32 means; a run of one is copied bit by bit."""
    column = tl.arange(0, BLOCK_D)
    inside = (column < pitch)[None, :]
    total = tl.zeros([SLOTS, ROWS, BLOCK_D], tl.float32)
    longer = tl.where(count > 1, count, 0)
    for start in range(0, tl.max(longer, 0), ROWS):
        step = start + tl.arange(0, ROWS)
        place = (source[:, None] + step[None, :])[:, :, None] * pitch + column[None, None, :]
        mask = (step[None, :] < longer[:, None])[:, :, None] & inside[None, :, :]
        total += tl.load(states + place, mask=mask, other=0.0).to(tl.float32)
    divisor = tl.broadcast_to(tl.maximum(count, 1).to(tl.float32)[:, None], [SLOTS, BLOCK_D])
    mean = tl.div_rn(tl.sum(total, 1), divisor)
    alone = (count == 1)[:, None]
    place = source[:, None] * pitch + column[None, :]
    rows = tl.load(states + place, mask=alone & inside, other=0.0)
    rows = tl.where(alone, rows, mean.to(rows.dtype))
    place = target[:, None] * pitch + column[None, :]
    tl.store(compact + place, rows, mask=there[:, None] & inside)
