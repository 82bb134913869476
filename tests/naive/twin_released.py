"""What ``semantics=reference`` reproduces, as plain loops: the released code of two papers with its
quirks (github.com: liuzuyan/ElasticCache, kv_cache.py; THU-MIG/PrefixKV, prefixkv.py)."""

from __future__ import annotations

from dataclasses import dataclass

from twin_model import Layer, Seen
from twin_rules import FixedPoint, NoRule, received


@dataclass
class ReleasedElastic(NoRule):
    """A permutation is taken for ranks; what is merged is counted from another origin than what
    stays; a single surplus entry is the very first."""

    keep: float
    sinks: int = 1
    distance: int = 25
    layer0: bool = False

    def after_prompt(self, block: int, layer: Layer, attention: Seen) -> None:
        del block
        total = layer.seen
        gone = int(total - total * (1 - (1 - self.keep)))
        if gone <= 0:
            return
        if gone == 1:
            FixedPoint.remove(layer, 0)
            return
        if total <= self.sinks + 1:  # too short for the released code, which guards nothing
            return
        scores = received(attention)[self.sinks : total - 1]
        order = sorted(range(len(scores)), key=lambda place: (scores[place], place))
        anchors = [place + self.sinks for place, one in enumerate(order) if one > gone]
        loose = [place for place, one in enumerate(order) if one <= gone]
        key, value = layer.key.clone(), layer.value.clone()
        for anchor in anchors:
            mine = [p for p in loose if min(anchors, key=lambda a: (abs(a - p), a)) == anchor]
            members = [anchor, *mine]  # the anchor may be its own member
            key[:, anchor] = layer.key[:, members].mean(1)
            value[:, anchor] = layer.value[:, members].mean(1)
        stay = [*range(self.sinks), *anchors, total - 1]
        layer.key, layer.value = key[:, stay], value[:, stay]

    def after_step(self, block: int, layer: Layer, step: int) -> None:
        del block, step
        if int(layer.key.shape[1] - layer.seen * (1 - (1 - self.keep))) <= 0:
            return
        point = layer.kept_of_prompt + 1 - self.distance  # counted before one more was dropped
        FixedPoint.remove(layer, point if point > 0 else layer.kept_of_prompt // 2)


@dataclass
class ReleasedPrefix(NoRule):
    """Every layer rounds on its own."""

    shares: list[float]
    sinks: int = 1
    distance: int = 25
    layer0: bool = False

    def after_prompt(self, block: int, layer: Layer, attention: Seen) -> None:
        total = layer.seen
        if total <= self.sinks + 1:  # too short for the released code, which guards nothing
            return
        gone = round((1 - self.shares[block]) * total)
        scores = received(attention)[self.sinks : total - 1]
        order = sorted(range(len(scores)), key=lambda place: (scores[place], place))
        stay = sorted(place + self.sinks for place in order[gone:])
        stay = [*range(self.sinks), *stay, total - 1]
        layer.key, layer.value = layer.key[:, stay], layer.value[:, stay]

    def after_step(self, block: int, layer: Layer, step: int) -> None:
        del step
        share = 1 - (1 - self.shares[block])
        if int(layer.key.shape[1] - layer.seen * share) <= 0:
            return
        point = layer.kept_of_prompt - self.distance
        FixedPoint.remove(layer, point if point >= 1 else layer.kept_of_prompt // 2)
