"""Kernels of ``lvlm::TokenMerge`` for the rules in which centres absorb loose tokens.

They run after those of kernel.py, whose words and lists they use, and write over its copies of the
centres. Lists of tokens keep each to the work there is; nothing is added atomically, so two runs
give the same bits. Arithmetic is fp32, dot products too (no TF32).
"""

# Triton reads upper case as compile-time constants, and mypy nothing of its types.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

MIN_NORM = tl.constexpr(1e-12)  # the contract's EPSILON
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def norms(
    hidden: tl.tensor,
    image_id: tl.tensor,
    norm: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ODD: tl.constexpr,
) -> None:
    """norm [B, N] fp32: of the image tokens, at least MIN_NORM. Grid (N / BLOCK_T, B)."""
    row = tl.program_id(1).to(tl.int64)
    if not ODD:
        width = width // 8 * 8
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    of_image = tl.load(image_id + row * length + token, token < length, -1) > 0
    line = hidden + (row * length + token)[:, None] * width
    total = tl.full((BLOCK_T,), 0, tl.float32)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)[None]
        state = tl.load(line + column, of_image[:, None] & (column < width), 0.0).to(tl.float32)
        total += tl.sum(state * state, 1)
    total = tl.maximum(tl.sqrt_rn(total), MIN_NORM)
    tl.store(norm + row * length + token, total, token < length)


@triton.jit
def candidates(
    hidden: tl.tensor,
    image_id: tl.tensor,
    norm: tl.tensor,
    centre_count: tl.tensor,
    centres: tl.tensor,
    loose: tl.tensor,
    loose_count: tl.tensor,
    cosine: tl.tensor,
    owner: tl.tensor,
    length: tl.tensor,
    images: tl.tensor,
    slots: tl.tensor,
    width: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ODD: tl.constexpr,
) -> None:
    """The nearest centre of every loose token, within each part of the centres.

    cosine fp32 and owner int32 (a centre's number, or -1), both [parts, B, N], by the place in
    ``loose``. The centres of an image are split evenly over the parts, in order.
    Grid (N / BLOCK_T, parts, B); programs beyond the loose tokens return at once.
    """
    row = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1)
    count = tl.load(loose_count + row)
    if tl.program_id(0) * BLOCK_T >= count:
        return
    if not ODD:
        width = width // 8 * 8
    hidden += row * length * width
    place = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = place < count
    token = tl.load(loose + row * length + place, live, 0)
    image = tl.load(image_id + row * length + token, live, 0).to(tl.int32)
    norm_t = tl.load(norm + row * length + token, live, 1.0)[:, None]
    line_t = hidden + token.to(tl.int64)[:, None] * width
    best = tl.full((BLOCK_T,), -INFINITY, tl.float32)
    number = tl.full((BLOCK_T,), -1, tl.int32)

    first = tl.min(tl.where(live, image, images)) - 1
    for m in range(first, tl.minimum(tl.max(image), images)):
        known = tl.minimum(tl.load(centre_count + row * images + m).to(tl.int32), slots)
        share = (known + BLOCK_C * tl.num_programs(1) - 1) // (BLOCK_C * tl.num_programs(1))
        share *= BLOCK_C
        for start in range(part * share, tl.minimum((part + 1) * share, known), BLOCK_C):
            nth = start + tl.arange(0, BLOCK_C)
            centre = tl.load(centres + (row * images + m) * slots + nth, nth < known, -1)
            norm_c = tl.load(norm + row * length + centre, centre >= 0, 1.0)[None]
            line_c = hidden + centre.to(tl.int64)[None] * width
            dot = tl.full((BLOCK_T, BLOCK_C), 0, tl.float32)
            for d in range(0, width, BLOCK_D):
                column = d + tl.arange(0, BLOCK_D)
                within = column < width
                a = tl.load(line_t + column[None], live[:, None] & within[None], 0.0)
                b = tl.load(line_c + column[:, None], (centre >= 0)[None] & within[:, None], 0.0)
                dot = tl.dot(a.to(tl.float32), b.to(tl.float32), dot, input_precision="ieee")
            found = tl.div_rn(tl.div_rn(dot, norm_c), norm_t)
            found = tl.where(found != found, INFINITY, found)  # as in the reference: NaN is highest
            pair = (image == m + 1)[:, None] & (centre >= 0)[None]
            found = tl.where(pair, found, -INFINITY)
            top = tl.max(found, 1)
            ahead = tl.min(tl.where(found == top[:, None], nth[None], slots), 1)
            number = tl.where(top > best, m * slots + ahead, number)
            best = tl.maximum(best, top)
    line = (part * tl.num_programs(2) + row) * length + place
    tl.store(cosine + line, best, live)
    tl.store(owner + line, number, live)


@triton.jit
def closest(
    cosine: tl.tensor,
    owner: tl.tensor,
    loose_count: tl.tensor,
    length: tl.tensor,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Leaves the nearest over all parts in the first one; equal: the earlier part, whose centres
    are the more important. Grid (N / BLOCK, B)."""
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = place < tl.load(loose_count + row)
    line = row * length + place
    best = tl.load(cosine + line, live, 0.0)
    number = tl.load(owner + line, live, -1)
    for part in range(1, PARTS):
        other = line + part * tl.num_programs(1).to(tl.int64) * length
        found = tl.load(cosine + other, live, 0.0)
        number = tl.where(found > best, tl.load(owner + other, live, -1), number)
        best = tl.maximum(best, found)
    tl.store(cosine + line, best, live)
    tl.store(owner + line, number, live)


@triton.jit
def group(
    cosine: tl.tensor,
    owner: tl.tensor,
    centres: tl.tensor,
    loose: tl.tensor,
    loose_count: tl.tensor,
    grouped: tl.tensor,
    begin: tl.tensor,
    absorbed: tl.tensor,
    new_index: tl.tensor,
    length: tl.tensor,
    numbers: tl.tensor,
    limit: tl.tensor,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    """The loose tokens in order of owner, similarity and index; each centre takes the first
    ``limit`` of its own.

    grouped [B, N] int32: tokens in that order; begin and absorbed [B, M K] int32: where a centre's
    begin and how many it takes; new_index of what is taken becomes its centre's.
    Grid (N / BLOCK_I, B); L² comparisons a row of L loose tokens.
    """
    row = tl.program_id(1).to(tl.int64)
    count = tl.load(loose_count + row)
    if tl.program_id(0) * BLOCK_I >= count:
        return
    cosine += row * length
    owner += row * length
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    live = i < count
    own = tl.load(owner + i, live, -1)
    near = tl.load(cosine + i, live, 0.0)[:, None]
    start_of = tl.full((BLOCK_I,), 0, tl.int32)
    place = tl.full((BLOCK_I,), 0, tl.int32)
    siblings = tl.full((BLOCK_I,), 0, tl.int32)
    for start in range(0, count, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = tl.load(owner + j, j < count, numbers)[None]  # what is not there: behind all
        nearer = tl.load(cosine + j, j < count, 0.0)[None]
        same = other == own[:, None]
        before = (nearer > near) | ((nearer == near) & (j[None] < i[:, None]))
        start_of += tl.sum((other < own[:, None]).to(tl.int32), 1)
        place += tl.sum((same & before).to(tl.int32), 1)
        siblings += tl.sum(same.to(tl.int32), 1)

    token = tl.load(loose + row * length + i, live, 0)
    tl.store(grouped + row * length + start_of + place, token, live)
    owned = live & (own >= 0)
    first = owned & (place == 0)
    tl.store(begin + row * numbers + own, start_of, first)
    tl.store(absorbed + row * numbers + own, tl.minimum(siblings, limit), first)
    taken = owned & (place < limit)
    centre = tl.load(centres + row * numbers + own, taken, 0)
    index = tl.load(new_index + row * length + centre, taken, -1)
    tl.store(new_index + row * length + token, index, taken)


@triton.jit
def means(
    hidden: tl.tensor,
    importance: tl.tensor,
    centres: tl.tensor,
    grouped: tl.tensor,
    begin: tl.tensor,
    absorbed: tl.tensor,
    new_index: tl.tensor,
    merged: tl.tensor,
    length: tl.tensor,
    slots: tl.tensor,
    numbers: tl.tensor,
    new_length: tl.tensor,
    width: tl.tensor,
    max_centres: tl.tensor,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ODD: tl.constexpr,
) -> None:
    """Over the copies of centres that absorb something: the importance-weighted mean, or the plain
    one where the weights sum to 0.

    Grid (M max_centres, D / BLOCK_D, B). Reads each absorbed state once, BLOCK_E at a time: a
    centre that absorbs n tokens costs n / BLOCK_E dependent reads.
    """
    row = tl.program_id(2).to(tl.int64)
    nth = tl.program_id(0) % max_centres
    number = row * numbers + tl.program_id(0) // max_centres * slots + nth
    count = tl.load(absorbed + number, nth < slots, 0)
    if count == 0:
        return
    if not ODD:
        width = width // 8 * 8
    importance += row * length
    grouped += row * length + tl.load(begin + number)
    hidden += row * length * width
    centre = tl.load(centres + number)
    weight = tl.load(importance + centre)
    total = weight
    for start in range(0, count, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        token = tl.load(grouped + e, e < count, 0)
        total += tl.sum(tl.load(importance + token, e < count, 0.0))
    equal = total == 0.0
    total = tl.where(equal, count + 1.0, total)

    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    within = column < width
    mean = tl.load(hidden + centre.to(tl.int64) * width + column, within, 0.0).to(tl.float32)
    mean *= tl.where(equal, 1.0, weight) / total
    for start in range(0, count, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        token = tl.load(grouped + e, e < count, 0)
        share = tl.where(equal, 1.0, tl.load(importance + token, e < count, 0.0)) / total
        line = hidden + token.to(tl.int64)[:, None] * width
        state = tl.load(line + column[None], (e < count)[:, None] & within[None], 0.0)
        mean += tl.sum(state.to(tl.float32) * share[:, None], 0)
    slot = tl.load(new_index + row * length + centre)
    line = merged + (row * new_length + slot) * width
    within = column < tl.where(slot < new_length, width, 0)
    tl.store(line + column, mean.to(merged.dtype.element_ty), within)
