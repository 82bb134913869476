"""The recipes' counts and choices as plain loops, from their definition (docs/recipes.md) alone.

Nothing here comes from lvlm. Every count that a definition rounds is rounded half to even, after
what lies below 1e-9 is taken for noise of floating point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from twin_model import Layer, Seen, Sequence


def rounded(share: float) -> int:
    return round(Fraction(round(share, 9)).limit_denominator(10**9))


def up(share: float) -> int:
    return math.ceil(round(share, 9))


def ranked(scores: list[float]) -> list[int]:
    """Places, the largest score first; equal ones by place."""
    return sorted(range(len(scores)), key=lambda place: (-scores[place], place))


class NoRule:
    """Recipe ``none``, and what the others leave as it is."""

    def shorten(self, block: int, sequence: Sequence, before: Seen | None) -> Sequence:
        del block, before
        return sequence

    def after_prompt(self, block: int, layer: Layer, attention: Seen) -> None:
        pass

    def after_step(self, block: int, layer: Layer, step: int) -> None:
        pass


def received(attention: Seen) -> list[float]:
    """Of every key: what all queries pay it, the mean over heads."""
    heads, queries, keys = attention.weights.shape
    scores = [0.0] * keys
    for key in range(keys):
        for head in range(heads):
            scores[key] += float(attention.weights[head, :, key].double().sum()) / heads
    assert queries == keys
    return scores


@dataclass
class FixedPoint(NoRule):
    """uniform, elastic-cache (``merge``) and, with ``shares`` of the layers, prefixkv; ``entered``:
    tokens that enter each layer, where that is not the same for all."""

    keep: float
    merge: bool = False
    shares: list[float] | None = None
    sinks: int = 1
    distance: int = 25
    entered: list[int] = field(default_factory=list)

    def after_prompt(self, block: int, layer: Layer, attention: Seen) -> None:
        total = layer.seen
        count = min(total, max(self.sinks + 1, self._count(block, total)))
        protected = {*range(min(self.sinks, total)), total - 1}
        best = [p for p in ranked(received(attention)) if p not in protected]
        stay = sorted(protected | set(best[: count - len(protected)]))
        if self.merge and len(stay) < total:
            buckets: dict[int, list[int]] = {p: [] for p in stay}
            for place in range(total):
                buckets[min(stay, key=lambda anchor: (abs(anchor - place), anchor))].append(place)
            layer.key = torch.stack([layer.key[:, buckets[p]].mean(1) for p in stay], 1)
            layer.value = torch.stack([layer.value[:, buckets[p]].mean(1) for p in stay], 1)
        else:
            layer.key, layer.value = layer.key[:, stay], layer.value[:, stay]

    def _count(self, block: int, total: int) -> int:
        if self.shares is None:
            return rounded(self.keep * total)
        entered = self.entered or [total] * len(self.shares)
        exact = [share * n for share, n in zip(self.shares, entered, strict=True)]
        counts = [math.floor(round(x, 9)) for x in exact]  # largest remainder over all layers
        rest = rounded(sum(exact)) - sum(counts)
        order = ranked([round(x - math.floor(round(x, 9)), 9) for x in exact])
        for place in [p for p in order if counts[p] < entered[p]][:rest]:
            counts[place] += 1
        assert min(counts) > self.sinks, "the test's fractions are too small for this twin"
        return counts[block]

    def after_step(self, block: int, layer: Layer, step: int) -> None:
        del step
        share = self.keep if self.shares is None else self.shares[block]
        if layer.key.shape[1] <= max(1, self.sinks, up(share * layer.seen)):
            return
        kept = layer.kept_of_prompt
        victim = kept - self.distance if kept > self.distance else kept // 2
        victim = min(max(victim, self.sinks), kept)
        others = [p for p in range(layer.key.shape[1]) if p != victim]
        layer.key, layer.value = layer.key[:, others], layer.value[:, others]


@dataclass
class Interval(NoRule):
    """lightvlm's own cache."""

    keep: float
    floor: int
    protect: int
    interval: int
    sinks: int = 4

    def after_prompt(self, block: int, layer: Layer, attention: Seen) -> None:
        del block, attention
        self._compact(layer)

    def after_step(self, block: int, layer: Layer, step: int) -> None:
        del block
        if step % self.interval == 0:
            self._compact(layer)

    def _compact(self, layer: Layer) -> None:
        there = layer.key.shape[1]
        budget = min(layer.seen, max(self.floor, up(self.keep * layer.seen)))
        budget = max(budget, min(layer.seen, self.sinks + self.protect))
        if there <= budget:
            return
        heads, width = layer.queries.shape[0], layer.key.shape[2]
        groups = heads // layer.key.shape[0]
        scores = torch.zeros(there, dtype=torch.float64)
        recent = min(self.protect, layer.queries.shape[1], there)
        for back in range(1, recent + 1):  # the query of the entry that lies ``back`` from the end
            visible = there - back + 1
            for head in range(heads):
                keys = layer.key[head // groups, :visible]
                logits = keys @ layer.queries[head, -back] * width**-0.5
                scores[:visible] += logits.softmax(0).double() / heads
        protected = {*range(self.sinks), *range(there - self.protect, there)}
        best = [p for p in ranked(scores.tolist()) if p not in protected]
        stay = sorted(protected | set(best[: budget - len(protected)]))
        layer.key, layer.value = layer.key[:, stay], layer.value[:, stay]


@dataclass
class Pyramid(NoRule):
    """lightvlm's merging over the cache rule ``cache``; ``tokens`` of a picture at the start."""

    keep: float
    stages: list[int]
    tokens: int
    cache: NoRule

    def shorten(self, block: int, sequence: Sequence, before: Seen | None) -> Sequence:
        if block == 0 and isinstance(self.cache, FixedPoint) and self.cache.shares is not None:
            text, pictures = sequence.picture.count(0), max(sequence.picture)
            layers = range(len(self.cache.shares))
            self.cache.entered = [text + pictures * self._left(layer) for layer in layers]
        if block not in self.stages:
            return sequence
        assert before is not None
        left = self._left(block)
        paid = before.weights[:, -1].mean(0).tolist()
        hidden = sequence.hidden.clone()
        gone: set[int] = set()
        for picture in range(1, max(sequence.picture) + 1):
            places = [p for p, owner in enumerate(sequence.picture) if owner == picture]
            order = [places[i] for i in ranked([paid[p] for p in places])]
            assert len(sequence.picture) - 1 not in places, "not for prompts that end in a picture"
            gone |= set(order[left:])
            self._recycle(sequence.hidden, hidden, order[:left], order[left:], paid)
        stay = [p for p in range(len(hidden)) if p not in gone]
        return Sequence(
            hidden[stay], [sequence.positions[p] for p in stay], [sequence.picture[p] for p in stay]
        )

    def _left(self, block: int) -> int:
        """Tokens of a picture that enter a block."""
        done = sum(stage <= block for stage in self.stages)
        return max(1, rounded(self.tokens * self.keep ** (done / len(self.stages))))

    @staticmethod
    def _recycle(
        old: torch.Tensor, new: torch.Tensor, stay: list[int], loose: list[int], paid: list[float]
    ) -> None:
        if len(stay) < 2:
            return
        centres = stay[-max(1, rounded(0.1 * len(stay))) :]
        claimed: dict[int, list[tuple[float, int]]] = {c: [] for c in centres}
        for token in loose:
            likeness = [float(torch.cosine_similarity(old[token], old[c], dim=0)) for c in centres]
            best = ranked(likeness)[0]
            claimed[centres[best]].append((-likeness[best], token))
        for centre, tokens in claimed.items():
            members = [centre, *(token for _, token in sorted(tokens)[:5])]
            weights = torch.tensor([paid[m] for m in members])
            if float(weights.sum()) == 0:
                weights = torch.ones(len(members))
            new[centre] = (weights[:, None] * old[members]).sum(0) / weights.sum()

    def after_prompt(self, block: int, layer: Layer, attention: Seen) -> None:
        self.cache.after_prompt(block, layer, attention)

    def after_step(self, block: int, layer: Layer, step: int) -> None:
        self.cache.after_step(block, layer, step)
