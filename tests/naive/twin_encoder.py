"""Image tokens dropped before the language model, as plain loops over lists."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from twin_merging import Pyramid
from twin_model import Seen, Sequence, Twin
from twin_rules import NoRule


def divprune(features: list[list[float]], count: int) -> list[int]:
    """Again and again the one whose least cosine distance to those there are is largest."""

    def distance(a: int, b: int) -> float:
        dot = sum(x * y for x, y in zip(features[a], features[b], strict=True))
        return 1 - dot / (math.hypot(*features[a]) * math.hypot(*features[b]))

    tokens = range(len(features))
    apart = [[distance(a, b) for b in tokens] for a in tokens]
    found: list[int] = []
    while len(found) < count:
        best, far = -1, -math.inf
        for token in tokens:
            others = found or [other for other in tokens if other != token]
            nearest = min((apart[token][other] for other in others), default=0.0)
            if token not in found and nearest > far:
                best, far = token, nearest
        found.append(best)
    return sorted(found)


def strided(features: list[list[float]], count: int) -> list[int]:
    return [math.floor((i + 0.5) * len(features) / count) for i in range(count)]


def by_chance(features: list[list[float]], count: int) -> list[int]:
    order = np.random.default_rng([0, len(features)]).permutation(len(features)).tolist()
    return sorted(order[:count])


def visionzip(
    features: list[list[float]], scores: list[list[float]], count: int
) -> dict[int, list[float]]:
    """The tokens that stay, with the others merged into them."""
    merged = min(round(round(count * 10 / 64, 9)), count - 1)
    paid = {token: score[0] for token, score in enumerate(scores)}
    dominant = sorted(paid, key=lambda token: (-paid[token], token))[: count - merged]
    rest = [token for token in paid if token not in dominant]
    found = {token: features[token] for token in dominant}
    if not merged:
        return found
    step = len(rest) // merged
    targets = rest[: step * merged : step]
    came: dict[int, list[int]] = {target: [] for target in targets}
    for token in rest:
        if token in came:
            continue
        likeness = []
        for target in targets:
            a, b = scores[token][1:], scores[target][1:]
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            likeness.append(dot / (math.hypot(*a) * math.hypot(*b)))
        came[targets[likeness.index(max(likeness))]].append(token)
    for target, tokens in came.items():
        found[target] = [
            own + (sum(features[t][i] for t in tokens) / len(tokens) if tokens else 0.0)
            for i, own in enumerate(features[target])
        ]
    return found


class LookingTwin(Twin):
    """A LLaVA that remembers what its tower pays each token in the layer whose output is used, and
    the tokens' keys there: ``scores`` of the images of the last prompt."""

    def _embed(self, prompt: str, images: list[Any]) -> Sequence:
        self.scores: list[list[list[float]]] = []
        return super()._embed(prompt, images)

    def _features(self, image: Any) -> torch.Tensor:
        tower, keys = self.model.model.vision_tower, []
        tower.config._attn_implementation = "eager"
        used = self.model.config.vision_feature_layer  # counted from the end, as layers are
        layer = tower.encoder.layers[used].self_attn
        hook = layer.k_proj.register_forward_hook(lambda _, __, out: keys.append(out[0]))
        pixels = self.images(image, return_tensors="pt").pixel_values
        weights = tower(pixels, output_attentions=True).attentions[used][0]
        hook.remove()
        has_class = hasattr(tower.embeddings, "class_embedding")
        paid = weights[:, 0] if has_class else weights.mean(1)  # [H,n]
        heads = keys[0].view(keys[0].shape[0], layer.num_heads, -1)
        found = torch.cat([paid.sum(0)[:, None], heads.mean(1)], 1)
        first = self.model.config.vision_feature_select_strategy == "default"
        self.scores.append(found[first:].tolist())
        return super()._features(image)


RULES = {"divprune": divprune, "strided": strided, "random": by_chance}


@dataclass
class AtEncoder(NoRule):
    """Before the first block each image loses tokens; the others stay where they were, or move
    together."""

    recipe: str
    keep: float
    closed: bool = False
    looking: LookingTwin | None = None

    def shorten(self, block: int, sequence: Sequence, before: Seen | None) -> Sequence:
        del before
        if block or self.keep == 1:
            return sequence
        stay = [index for index, image in enumerate(sequence.image) if image == 0]
        hidden = sequence.hidden.clone()
        for image in range(1, max(sequence.image) + 1):
            own = [index for index, number in enumerate(sequence.image) if number == image]
            count = max(1, round(round(len(own) * self.keep, 9)))
            features = [sequence.hidden[index].tolist() for index in own]
            if self.recipe == "visionzip":
                assert self.looking is not None
                made = visionzip(features, self.looking.scores[image - 1], count)
                for index, row in made.items():
                    hidden[own[index]] = torch.tensor(row)
                stay += [own[index] for index in made]
            else:
                stay += [own[index] for index in RULES[self.recipe](features, count)]
        stay.sort()
        positions = sequence.positions[:, stay]
        if self.closed:
            positions = torch.arange(len(stay))[None]
        return Sequence(hidden[stay], positions, [sequence.image[i] for i in stay])


@dataclass
class Both(Pyramid):
    """What ``encoder`` leaves is merged later; fractions are of the whole images."""

    encoder: AtEncoder = field(default_factory=lambda: AtEncoder("divprune", 1.0))

    def shorten(self, block: int, sequence: Sequence, before: Seen | None) -> Sequence:
        sequence = super().shorten(block, sequence, before)
        return self.encoder.shorten(block, sequence, before)
