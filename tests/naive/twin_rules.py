"""The caches' counts and choices as plain loops, from their definition (docs/recipes.md) alone.

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

    layer0 = False

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


def shared_out(shares: list[float], low: list[int], high: list[int]) -> list[int]:
    """Integers between ``low`` and ``high`` whose sum is that of the ``shares``, rounded:
    one by one to whoever is furthest below its share, the first of equals."""
    counts = list(low)
    total = min(max(rounded(math.fsum(shares)), sum(low)), sum(high))
    while sum(counts) < total:
        open_ones = [i for i in range(len(counts)) if counts[i] < high[i]]
        counts[max(open_ones, key=lambda i: (round(shares[i] - counts[i], 9), -i))] += 1
    return counts


def merged(states: torch.Tensor, stay: list[int]) -> torch.Tensor:
    """Of states [H,N,d] those that stay, each the mean over all that are nearest to it."""
    buckets: dict[int, list[int]] = {p: [] for p in stay}
    for place in range(states.shape[1]):
        buckets[min(stay, key=lambda anchor: (abs(anchor - place), anchor))].append(place)
    return torch.stack([states[:, buckets[p]].mean(1) for p in stay], 1)


@dataclass
class FixedPoint(NoRule):
    """uniform, elastic-cache (``merge``; ``within`` a modality) and, with ``shares`` of the layers,
    prefixkv; ``entered``: tokens that enter each layer, where that is not the same for all."""

    keep: float
    merge: bool = False
    within: bool = False
    shares: list[float] | None = None
    sinks: int = 1
    distance: int = 25
    cap: int | None = None
    layer0: bool = False
    entered: list[int] = field(default_factory=list)
    images: list[bool] = field(default_factory=list)

    def shorten(self, block: int, sequence: Sequence, before: Seen | None) -> Sequence:
        del block, before
        self.images = [owner > 0 for owner in sequence.image]
        return sequence

    def after_prompt(self, block: int, layer: Layer, attention: Seen) -> None:
        total = layer.seen
        count = self._count(block, total)
        protected = {*range(min(self.sinks, total)), total - 1}
        best = [p for p in ranked(received(attention)) if p not in protected]
        if self.within:
            borders = {p + side for p in range(total - 1) for side in (0, 1)
                       if self.images[p] != self.images[p + 1]}  # fmt: skip
            best = [*sorted(borders - protected), *(p for p in best if p not in borders)]
        stay = sorted(protected | set(best[: count - len(protected)]))
        layer.key, layer.value = (
            merged(states, stay) if self.merge else states[:, stay]
            for states in (layer.key, layer.value)
        )

    def _count(self, block: int, total: int) -> int:
        layers = len(self.shares) if self.shares is not None else block + 1
        entered = self.entered or [total] * layers
        high = [n if self.cap is None else min(n, self.cap) for n in entered]
        low = [min(n, self.sinks + 1) for n in entered]
        if self.shares is None:
            return min(max(rounded(self.keep * total), low[block]), high[block])
        exact = [share * n for share, n in zip(self.shares, entered, strict=True)]
        return shared_out(exact, low, high)[block]

    def after_step(self, block: int, layer: Layer, step: int) -> None:
        del step
        share = self.keep if self.shares is None else self.shares[block]
        budget = max(1, self.sinks, up(share * layer.seen))
        if layer.key.shape[1] <= (budget if self.cap is None else min(budget, self.cap)):
            return
        kept = layer.kept_of_prompt
        victim = kept - self.distance if kept > self.distance else kept // 2
        self.remove(layer, min(max(victim, self.sinks), kept))

    @staticmethod
    def remove(layer: Layer, victim: int) -> None:
        others = [p for p in range(layer.key.shape[1]) if p != victim]
        layer.key, layer.value = layer.key[:, others], layer.value[:, others]


@dataclass
class Interval(NoRule):
    """lightvlm's own cache; ``shares`` of the layers, where a profile has them."""

    keep: float
    floor: int
    protect: int
    interval: int
    sinks: int = 4
    cap: int | None = None
    layer0: bool = False
    shares: list[float] | None = None

    def after_prompt(self, block: int, layer: Layer, attention: Seen) -> None:
        self._compact(block, layer, attention)

    def after_step(self, block: int, layer: Layer, step: int) -> None:
        if step % self.interval == 0:
            self._compact(block, layer, None)

    def _compact(self, block: int, layer: Layer, attention: Seen | None) -> None:
        there = layer.key.shape[1]
        share = self.keep if self.shares is None else self.shares[block]
        budget = min(layer.seen, max(self.floor, up(share * layer.seen)))
        budget = max(budget, min(layer.seen, self.sinks + self.protect))
        budget = budget if self.cap is None else min(budget, self.cap)
        if there <= budget:
            return
        recent = min(self.protect, layer.queries.shape[1], there)
        scores = torch.zeros(there, dtype=torch.float64)
        for back in range(1, recent + 1):  # the query of the entry that lies ``back`` from the end
            if attention is not None:  # which may see what follows, within an image
                scores += attention.weights[:, -back].double().mean(0)
            else:
                self._attend(layer, back, scores)
        protected = {*range(self.sinks), *range(there - self.protect, there)}
        best = [p for p in ranked(scores.tolist()) if p not in protected]
        stay = sorted(protected | set(best[: budget - len(protected)]))
        layer.key, layer.value = layer.key[:, stay], layer.value[:, stay]

    @staticmethod
    def _attend(layer: Layer, back: int, scores: torch.Tensor) -> None:
        """Add what a query pays, the mean over heads."""
        heads, width = layer.queries.shape[0], layer.key.shape[2]
        visible = layer.key.shape[1] - back + 1
        for head in range(heads):
            keys = layer.key[head // (heads // layer.key.shape[0]), :visible]
            logits = keys @ layer.queries[head, -back] * width**-0.5
            scores[:visible] += logits.softmax(0).double() / heads


@dataclass
class LastQueries(NoRule):
    """snapkv and, with ``shares`` of the layers, pyramidkv: every key head on its own keeps what
    the prompt's last queries attend to."""

    keep: float
    window: int = 64
    kernel: int = 5
    pool: str = "mean"
    sinks: int = 0
    cap: int | None = None
    shares: list[float] | None = None
    merge: bool = False

    def after_prompt(self, block: int, layer: Layer, attention: Seen) -> None:
        total = layer.seen
        least, most = min(total, self.sinks + self.window), min(total, self.cap or total)
        count = min(max(rounded(self.keep * total), least), most)
        if self.shares is not None:
            exact, layers = [share * total for share in self.shares], len(self.shares)
            count = shared_out(exact, [least] * layers, [most] * layers)[block]
        keys, values = [], []
        for head in range(len(layer.key)):
            stay = sorted(self._kept(head, count, total, layer, attention))
            for kept, states in ((keys, layer.key), (values, layer.value)):
                own = states[head : head + 1]
                kept.append(merged(own, stay)[0] if self.merge else own[0, stay])
        layer.key, layer.value = torch.stack(keys), torch.stack(values)

    def _kept(self, head: int, count: int, total: int, layer: Layer, attention: Seen) -> set[int]:
        group = len(attention.weights) // len(layer.key)
        end = max(0, total - self.window)
        paid = [
            sum(
                float(attention.weights[query_head, query, key])
                for query_head in range(head * group, (head + 1) * group)
                for query in range(end, total)
            )
            for key in range(end)
        ]
        half = self.kernel // 2
        pooled = []
        for key in range(end):
            near = paid[max(0, key - half) : key + half + 1]
            pooled.append(max(near) if self.pool == "max" else sum(near) / self.kernel)
        always = {*range(min(self.sinks, total)), *range(end, total)}
        best = [key for key in ranked(pooled) if key not in always]
        return always | set(best[: count - len(always)])


@dataclass
class Sliding(NoRule):
    """streaming-llm: the first entries and the last ones."""

    keep: float
    sinks: int = 4
    cap: int | None = None
    merge: bool = False

    def after_prompt(self, block: int, layer: Layer, attention: Seen) -> None:
        del block, attention
        total = layer.seen
        count = max(rounded(self.keep * total), min(total, self.sinks + 1))
        if self.merge:
            count = count if self.cap is None else min(count, self.cap)
            first = range(min(self.sinks, count))
            stay = [*first, *range(total - count + len(first), total)]
            layer.key, layer.value = merged(layer.key, stay), merged(layer.value, stay)
            return
        self._slide(layer, count)

    def after_step(self, block: int, layer: Layer, step: int) -> None:
        del block, step
        self._slide(layer, max(self.sinks + 1, up(self.keep * layer.seen)))

    def _slide(self, layer: Layer, count: int) -> None:
        there = layer.key.shape[1]
        count = count if self.cap is None else min(count, self.cap)
        while there > count:  # the oldest that is no sink
            there -= 1
            FixedPoint.remove(layer, self.sinks)


@dataclass
class HeavyHitters(NoRule):
    """h2o: what got most attention so far, of every query since the prompt began, and the last."""

    keep: float
    recent: int = 32
    interval: int = 1
    sinks: int = 0
    cap: int | None = None
    sums: dict[int, list[float]] = field(default_factory=dict)  # of every block's entries

    def after_prompt(self, block: int, layer: Layer, attention: Seen) -> None:
        self.sums[block] = received(attention)
        self._evict(block, layer)

    def after_step(self, block: int, layer: Layer, step: int) -> None:
        sums = self.sums[block]
        sums.append(0.0)
        heads, (there, width) = layer.queries.shape[0], layer.key.shape[1:]
        assert there == len(sums)
        for head in range(heads):
            keys = layer.key[head // (heads // layer.key.shape[0])]
            paid = (keys @ layer.queries[head, -1] * width**-0.5).softmax(0)
            for entry in range(there):
                sums[entry] += float(paid[entry]) / heads
        if step % self.interval == 0:
            self._evict(block, layer)

    def _evict(self, block: int, layer: Layer) -> None:
        sums = self.sums[block]
        least = min(layer.seen, self.sinks + self.recent)
        budget = max(up(self.keep * layer.seen), least)
        budget = budget if self.cap is None else min(budget, self.cap)
        while len(sums) > budget:
            loose = range(self.sinks, len(sums) - self.recent)
            victim = min(loose, key=lambda entry: (sums[entry], -entry))
            del sums[victim]
            FixedPoint.remove(layer, victim)
