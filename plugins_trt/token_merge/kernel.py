"""Kernels of ``lvlm::TokenMerge`` that every rule has: what stays, where it goes, moving it there.

Rows are B, tokens N, images M, slots of kept tokens per image K, output slots Nout, hidden width D.
A *loose* token is one that its image does not keep. A *centre* has a number: (image - 1) K + its
place among the centres of its image, the more important first.

Nothing is sorted: order comes from counting what precedes, so any length works and ties fall as in
the reference.
"""

# Triton reads upper case as compile-time constants, and mypy nothing of its types.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def rank(
    importance: tl.tensor,
    image_id: tl.tensor,
    ranks: tl.tensor,
    centres: tl.tensor,
    absorbed: tl.tensor,
    length: tl.tensor,
    numbers: tl.tensor,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """ranks [B, N] int32: how many tokens of its image precede each image token.

    Also empties the lists that ``layout`` and ``group`` fill: centres -1, absorbed 0 ([B, M K]).
    Grid (N / BLOCK_I, B); N² comparisons a row.
    """
    row = tl.program_id(1).to(tl.int64)
    importance += row * length
    image_id += row * length
    for start in range(tl.program_id(0) * BLOCK_I, numbers, tl.num_programs(0) * BLOCK_I):
        number = start + tl.arange(0, BLOCK_I)
        tl.store(centres + row * numbers + number, -1, number < numbers)
        tl.store(absorbed + row * numbers + number, 0, number < numbers)

    last = -1
    for start in range(0, length, BLOCK):
        j = start + tl.arange(0, BLOCK)
        image = tl.load(image_id + j, j < length, -1)
        last = tl.maximum(last, tl.max(tl.where(image >= 0, j, -1)))

    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    image_i = tl.load(image_id + i, i < length, -1).to(tl.int32)
    mine = tl.load(importance + i, image_i > 0, 0.0)
    mine = tl.where(i == last, INFINITY, mine)[:, None]
    count = tl.full((BLOCK_I,), 0, tl.int32)
    if tl.max(image_i) > 0:
        for start in range(0, length, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            image_j = tl.load(image_id + j, j < length, -1).to(tl.int32)
            theirs = tl.load(importance + j, image_j > 0, 0.0)
            theirs = tl.where(j == last, INFINITY, theirs)[None]
            before = (theirs > mine) | ((theirs == mine) & (j[None] < i[:, None]))
            before &= image_i[:, None] == image_j[None]
            count += tl.sum(before.to(tl.int32), 1)
    tl.store(ranks + row * length + i, count, i < length)


@triton.jit
def layout(
    image_id: tl.tensor,
    keep: tl.tensor,
    centre_count: tl.tensor,
    ranks: tl.tensor,
    new_index: tl.tensor,
    origin: tl.tensor,
    centres: tl.tensor,
    loose: tl.tensor,
    loose_count: tl.tensor,
    length: tl.tensor,
    images: tl.tensor,
    slots: tl.tensor,
    new_length: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Places where everything goes, by running counts.

    new_index [B, N] int64: of what stays, else -1; origin [B, Nout] int32: its inverse, -1 where
    the output is padding; centres [B, M K] int32: tokens by number, the last ``centre_count``
    [B, M] of those that stay; loose [B, N] and loose_count [B] int32: the others, by index.
    Grid (B): a row is one program, which counts on from block to block.
    """
    row = tl.program_id(0).to(tl.int64)
    used = 0
    others = 0
    for start in range(0, length, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < length
        image = tl.load(image_id + row * length + token, inside, -1).to(tl.int32)
        place = tl.load(ranks + row * length + token, inside, 0)
        of_image = (image > 0) & (image <= images)
        kept = tl.load(keep + row * images + image - 1, of_image, 0).to(tl.int32)
        last = tl.load(centre_count + row * images + image - 1, of_image, 0).to(tl.int32)

        stays = (image == 0) | (of_image & (place < kept))
        index = used + tl.cumsum(stays.to(tl.int32), 0) - 1
        used += tl.sum(stays.to(tl.int32))
        tl.store(new_index + row * length + token, tl.where(stays, index, -1), inside)
        tl.store(origin + row * new_length + index, token, stays & (index < new_length))

        gone = (image > 0) & (stays == 0)
        index = others + tl.cumsum(gone.to(tl.int32), 0) - 1
        others += tl.sum(gone.to(tl.int32))
        tl.store(loose + row * length + index, token, gone)

        nth = place - (kept - last)  # which centre of its image, if not negative
        number = (row * images + image - 1) * slots + nth
        tl.store(centres + number, token, of_image & stays & (nth >= 0) & (nth < slots))
    tl.store(loose_count + row, others)
    for start in range(used, new_length, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(origin + row * new_length + slot, -1, slot < new_length)


@triton.jit
def copy(
    hidden: tl.tensor,
    positions: tl.tensor,
    image_id: tl.tensor,
    origin: tl.tensor,
    merged: tl.tensor,
    merged_positions: tl.tensor,
    merged_image_id: tl.tensor,
    length: tl.tensor,
    new_length: tl.tensor,
    width: tl.tensor,
    leads: tl.tensor,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ODD: tl.constexpr,
) -> None:
    """Copy what stays, bit by bit, into its new place; padding.

    positions [leads, B, N] → merged_positions [leads, B, Nout]. Grid (Nout / BLOCK_S, D / BLOCK_D,
    B). ODD, here and below: D is no multiple of 8.
    """
    row = tl.program_id(2).to(tl.int64)
    if not ODD:
        width = width // 8 * 8  # shows the compiler that 16 bytes may be read at once
    slot = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = slot < new_length
    token = tl.load(origin + row * new_length + slot, inside, -1)
    there = token >= 0

    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    within = (column < width)[None]
    source = (row * length + token)[:, None] * width + column[None]
    target = (row * new_length + slot)[:, None] * width + column[None]
    state = tl.load(hidden + source, there[:, None] & within, 0.0)
    tl.store(merged + target, state, inside[:, None] & within)

    if tl.program_id(1) == 0:
        image = tl.load(image_id + row * length + token, there, -1)
        tl.store(merged_image_id + row * new_length + slot, image, inside)
        for lead in range(leads):
            line = lead * tl.num_programs(2) + row
            position = tl.load(positions + line * length + token, there, 0)
            tl.store(merged_positions + line * new_length + slot, position, inside)
