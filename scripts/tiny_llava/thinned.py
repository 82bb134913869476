"""Batches of which some image tokens are missing, as reductions leave them.

Large models answer well from a part of an image's tokens without being trained for it; one of this
size does not, until it has seen images with tokens missing, before its first block or from a later
one on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tiny_llava.sequences import SequenceBatch

IMAGE_ID = 3
MIN_SHARE = 0.05  # part of the image tokens
DEPTHS = 6  # tokens go before one of so many blocks, if not before the first


@dataclass(frozen=True)
class Cut:
    """A cut: from block ``block`` on only these columns [B, S'] are there, of those that were."""

    block: int
    columns: torch.Tensor


def draw_cuts(batch: SequenceBatch, generator: torch.Generator) -> list[Cut]:
    """Draw what a batch loses: nothing, tokens before the first block, from later blocks on, or
    both."""
    form = _uniform(generator)
    blocks: list[int] = []
    if form > 0.25:
        blocks = [0] if form < 0.7 else []
        if form > 0.6:
            blocks += sorted({1 + int(DEPTHS * _uniform(generator)) for _ in range(3)})
    order = _order(batch, generator)
    part, cuts = 1.0, []
    here = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
    for block in blocks:
        least = MIN_SHARE if len(blocks) == 1 else max(MIN_SHARE, part / 3)
        part *= (least / part) ** (_uniform(generator) if block else _uniform(generator) ** 0.8)
        stay = (order < part) | (batch.ids != IMAGE_ID)
        columns = _columns(stay.gather(1, here))
        here = here.gather(1, columns)
        cuts.append(Cut(block, columns))
    return cuts


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _order(batch: SequenceBatch, generator: torch.Generator) -> torch.Tensor:
    """[B, S]: of image tokens their rank within their image, 0 to 1, in which they stay: by
    chance, more or less often those that show something, and one of every thing at the front."""
    rows, images = len(batch.ids), len(batch.images) // len(batch.ids)
    place = batch.patch_place.reshape(rows * images, -1)
    chance = torch.rand(place.shape, generator=generator)
    likely = 10 ** (1.2 * _uniform(generator) - 0.2)
    key = torch.where(place > 0, chance ** (1 / likely), chance)
    if _uniform(generator) < 0.8:
        for number in range(1, 10):
            best = torch.where(place == number, chance, -1.0).max(1)
            one = best.values >= 0
            key[torch.arange(len(place))[one], best.indices[one]] = 2.0
    rank = key.argsort(1, descending=True).argsort(1) / place.shape[1]
    order = torch.zeros(batch.ids.shape)
    order[batch.ids == IMAGE_ID] = rank.flatten().float()
    return order


def _columns(stay: torch.Tensor) -> torch.Tensor:
    """Numbers [B, S'] of those that stay, in order; as many in every row."""
    counts = stay.sum(1)
    if not bool((counts == counts[0]).all()):
        raise AssertionError("rows lose different numbers of tokens")
    return stay.nonzero()[:, 1].reshape(len(stay), -1)


def at(batch: SequenceBatch, columns: torch.Tensor) -> SequenceBatch:
    """The batch's columns."""
    parts = ("ids", "turn", "parent", "position", "kind", "answer")
    return batch._replace(**{part: getattr(batch, part).gather(1, columns) for part in parts})
