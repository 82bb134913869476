"""Kernels of ``lvlm::TokenMerge`` with merge=illava, whose centres may share what they take.

They run after those of kernel.py, whose words and lists they use, and write over its copies of the
centres. ``product`` [B, M C, N] fp32 has a line for each centre of each image (C the most that one
has), by the place in ``loose``. Arithmetic is fp32, dot products too (no TF32); nothing is added
atomically, so two runs give the same bits.
"""

# Triton reads upper case as compile-time constants, and mypy nothing of its types.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def dot_products(
    hidden: tl.tensor,
    image_id: tl.tensor,
    centre_count: tl.tensor,
    centres: tl.tensor,
    loose: tl.tensor,
    loose_count: tl.tensor,
    product: tl.tensor,
    length: tl.tensor,
    images: tl.tensor,
    slots: tl.tensor,
    width: tl.tensor,
    max_centres: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ODD: tl.constexpr,
) -> None:
    """Dot products of an image's centres with the loose tokens; -inf with another image's.

    Grid (N / BLOCK_T, M, B); programs beyond the loose tokens return at once.
    """
    row = tl.program_id(2).to(tl.int64)
    m = tl.program_id(1)
    count = tl.load(loose_count + row)
    if tl.program_id(0) * BLOCK_T >= count:
        return
    if not ODD:
        width = width // 8 * 8
    hidden += row * length * width
    place = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = place < count
    token = tl.load(loose + row * length + place, live, 0)
    mine = tl.load(image_id + row * length + token, live, 0) == m + 1
    line_t = hidden + token.to(tl.int64)[:, None] * width
    known = tl.minimum(tl.load(centre_count + row * images + m).to(tl.int32), slots)
    known = tl.minimum(known, max_centres)
    for start in range(0, known, BLOCK_C):
        nth = start + tl.arange(0, BLOCK_C)
        centre = tl.load(centres + (row * images + m) * slots + nth, nth < known, -1)
        there = centre >= 0
        line_c = hidden + centre.to(tl.int64)[None] * width
        dot = tl.full((BLOCK_T, BLOCK_C), 0, tl.float32)
        for d in range(0, width, BLOCK_D):
            column = d + tl.arange(0, BLOCK_D)
            within = column < width
            a = tl.load(line_t + column[None], mine[:, None] & within[None], 0.0)
            b = tl.load(line_c + column[:, None], there[None] & within[:, None], 0.0)
            dot = tl.dot(a.to(tl.float32), b.to(tl.float32), dot, input_precision="ieee")
        dot = tl.where(dot != dot, INFINITY, dot)  # as in the reference: NaN is highest
        dot = tl.where(mine[:, None] & there[None], dot, -INFINITY)
        line = ((row * images + m) * max_centres + nth)[None] * length + place[:, None]
        tl.store(product + line, dot, live[:, None] & (nth < known)[None])


@triton.jit
def choose(
    centre_count: tl.tensor,
    loose_count: tl.tensor,
    product: tl.tensor,
    best: tl.tensor,
    lowest: tl.tensor,
    last: tl.tensor,
    length: tl.tensor,
    images: tl.tensor,
    slots: tl.tensor,
    max_centres: tl.tensor,
    limit: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Bounds of what each centre takes, the ``limit`` largest dot products, [B, M C]: the largest
    (best), the smallest (lowest) and the last place at which that one is taken (last; -1: nothing).

    Grid (M C, B); reads a line ``limit`` times.
    """
    row = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) // max_centres
    nth = tl.program_id(0) % max_centres
    number = row * images * max_centres + tl.program_id(0)
    known = tl.minimum(tl.load(centre_count + row * images + m).to(tl.int32), slots)
    count = tl.load(loose_count + row)
    product += number * length
    largest = -INFINITY
    bound = INFINITY
    at = -1
    go_on = nth < known
    taken = 0
    while go_on & (taken < limit):
        top = -INFINITY
        top_at = -1
        for start in range(0, count, BLOCK):
            place = start + tl.arange(0, BLOCK)
            found = tl.load(product + place, place < count, -INFINITY)
            behind = (found < bound) | ((found == bound) & (place > at))
            found = tl.where(behind, found, -INFINITY)
            highest = tl.max(found, 0)
            first = tl.min(tl.where(found == highest, place, length), 0)
            top_at = tl.where(highest > top, first, top_at)
            top = tl.maximum(top, highest)
        go_on = top_at >= 0
        bound = tl.where(go_on, top, bound)
        at = tl.where(go_on, top_at, at)
        largest = tl.maximum(largest, top)
        taken += 1
    tl.store(best + number, largest)
    tl.store(lowest + number, bound)
    tl.store(last + number, at)


@triton.jit
def claim(
    image_id: tl.tensor,
    centre_count: tl.tensor,
    centres: tl.tensor,
    loose: tl.tensor,
    loose_count: tl.tensor,
    product: tl.tensor,
    lowest: tl.tensor,
    last: tl.tensor,
    new_index: tl.tensor,
    length: tl.tensor,
    images: tl.tensor,
    slots: tl.tensor,
    max_centres: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """new_index of what is taken becomes that of the most similar centre that took it; equal: the
    more important one. Grid (N / BLOCK, B)."""
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = place < tl.load(loose_count + row)
    token = tl.load(loose + row * length + place, live, 0)
    image = tl.load(image_id + row * length + token, live, 0)
    top = tl.full((BLOCK,), -INFINITY, tl.float32)
    owner = tl.full((BLOCK,), -1, tl.int32)
    for m in range(images):
        known = tl.minimum(tl.load(centre_count + row * images + m).to(tl.int32), slots)
        for nth in range(tl.minimum(known, max_centres)):
            number = (row * images + m) * max_centres + nth
            mine = live & (image == m + 1)
            found = tl.load(product + number * length + place, mine, -INFINITY)
            bound = tl.load(lowest + number)
            taken = (found > bound) | ((found == bound) & (place <= tl.load(last + number)))
            nearer = mine & taken & (found > top)
            centre = tl.load(centres + (row * images + m) * slots + nth)
            owner = tl.where(nearer, centre, owner)
            top = tl.where(nearer, found, top)
    taken = owner >= 0
    index = tl.load(new_index + row * length + owner, taken, -1)
    tl.store(new_index + row * length + token, index, taken)


@triton.jit
def halves(
    hidden: tl.tensor,
    centre_count: tl.tensor,
    centres: tl.tensor,
    loose: tl.tensor,
    loose_count: tl.tensor,
    product: tl.tensor,
    best: tl.tensor,
    lowest: tl.tensor,
    last: tl.tensor,
    new_index: tl.tensor,
    merged: tl.tensor,
    length: tl.tensor,
    images: tl.tensor,
    slots: tl.tensor,
    new_length: tl.tensor,
    width: tl.tensor,
    max_centres: tl.tensor,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ODD: tl.constexpr,
) -> None:
    """Over the copies of centres that take something: half of them, and half of the mean of what
    they take, weighted by the softmax of the dot products over the root of the width.

    Grid (M C, D / BLOCK_D, B). Reads the states of what is taken alone.
    """
    row = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) // max_centres
    nth = tl.program_id(0) % max_centres
    number = row * images * max_centres + tl.program_id(0)
    known = tl.minimum(tl.load(centre_count + row * images + m).to(tl.int32), slots)
    centre = tl.load(centres + (row * images + m) * slots + nth, nth < known, -1)
    at = tl.load(last + number)
    if (centre < 0) | (at < 0):
        return
    root = tl.sqrt_rn(width.to(tl.float32))
    if not ODD:
        width = width // 8 * 8
    hidden += row * length * width
    product += number * length
    largest = tl.load(best + number)
    bound = tl.load(lowest + number)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    within = column < width
    total = 0.0
    mean = tl.full((BLOCK_D,), 0, tl.float32)
    count = tl.load(loose_count + row)
    for start in range(0, count, BLOCK_E):
        place = start + tl.arange(0, BLOCK_E)
        found = tl.load(product + place, place < count, -INFINITY)
        taken = (found > bound) | ((found == bound) & (place <= at))
        taken &= place < count
        if tl.max(taken.to(tl.int32), 0) > 0:
            share = tl.exp(tl.where(taken, (found - largest) / root, -INFINITY))
            total += tl.sum(share, 0)
            token = tl.load(loose + row * length + place, taken, 0)
            line = hidden + token.to(tl.int64)[:, None] * width
            state = tl.load(line + column[None], taken[:, None] & within[None], 0.0)
            mean += tl.sum(state.to(tl.float32) * share[:, None], 0)
    own = tl.load(hidden + centre.to(tl.int64) * width + column, within, 0.0).to(tl.float32)
    slot = tl.load(new_index + row * length + centre)
    line = merged + (row * new_length + slot) * width
    within = column < tl.where(slot < new_length, width, 0)
    tl.store(line + column, ((own + mean / total) * 0.5).to(merged.dtype.element_ty), within)
