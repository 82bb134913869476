"""Images and many questions about them as one training sequence.

The questions cannot see each other (block mask, positions that begin again), so that the images'
tokens are paid for once; the second turn of a conversation sees the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from lvlm.calibration.datasets.scenes.drawing import (
    COLOURS,
    DENSITIES,
    NAMES,
    PATCH,
    Density,
    Scene,
    draw_scene,
)
from lvlm.calibration.datasets.scenes.glyphs import Split
from lvlm.calibration.datasets.scenes.questions import KINDS, Kind, Turn, ask
from tiny_llava.shape import IMAGE_TOKENS, PATCHES

PREFIX, PAD = -1, -2  # instead of the number of a turn
TEXT = 376  # tokens of questions and answers in a sequence, at most


class SequenceBatch(NamedTuple):
    """Sequences of S tokens, each with P images."""

    images: torch.Tensor  # uint8 [B * P, SIDE, SIDE, 3]
    patch_name: torch.Tensor  # [B * P, IMAGE_TOKENS]: number of the thing's name, 0 for none
    patch_colour: torch.Tensor  # the same of its colour
    patch_place: torch.Tensor  # the same of its place
    ids: torch.Tensor  # [B, S]
    turn: torch.Tensor  # [B, S]: PREFIX, PAD or the number of the token's turn
    parent: torch.Tensor  # [B, S]: the turn that it also sees, PREFIX if none
    position: torch.Tensor  # [B, S]
    kind: torch.Tensor  # [B, S]: number of the kind whose answer the token belongs to, else -1
    density: torch.Tensor  # [B]: of the first image
    answer: torch.Tensor  # [B, S]: 1 / root of the length of the token's answer, else 0


@dataclass(frozen=True)
class Mix:
    """A mix of questions of a sequence."""

    kinds: tuple[Kind, ...]
    images: int = 1


ONE = Mix(tuple(k for k in KINDS if k != "pictures"))
TWO = Mix(("pictures",), images=2)
# What was learned least well after so many steps is asked more often from then on.
LATER_FROM = 4618
LATER = Mix((*ONE.kinds, "where", "where", "count", "colour"))
# With image tokens missing: what is right least often
FEWER = Mix((*ONE.kinds, "where", "where", "where", "colour", "colour", "colour", "count"))


def mix_of_step(step: int) -> Mix:
    """Every sixth step has two images a prompt, later every fourth."""
    later = step >= LATER_FROM
    every = 4 if later else 6
    if step % every == every - 1:
        return TWO
    return LATER if later else ONE


class Packer:
    """Makes batches; every one is a function of the seed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.start = [1, *self.encode("USER: ")]
        self.image = [*[3] * IMAGE_TOKENS, *self.encode("\n")]

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def batch(self, seed: Sequence[int], size: int, mix: Mix, split: Split) -> SequenceBatch:
        rng = np.random.default_rng(list(seed))
        scenes = [
            tuple(draw_scene(rng, split, _density(rng)) for _ in range(mix.images))
            for _ in range(size)
        ]
        rows = [self._sequence(s, mix, rng) for s in scenes]
        flat = [scene for s in scenes for scene in s]
        labels = [patch_labels(scene) for scene in flat]
        ids, turn, parent, position, kind, answer = (
            torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True)
        )
        return SequenceBatch(
            images=torch.from_numpy(np.stack([scene.image for scene in flat])),
            patch_name=torch.from_numpy(np.stack([name for name, _, _ in labels])),
            patch_colour=torch.from_numpy(np.stack([colour for _, colour, _ in labels])),
            patch_place=torch.from_numpy(np.stack([place for _, _, place in labels])),
            ids=ids,
            turn=turn,
            parent=parent,
            position=position,
            kind=kind,
            density=torch.tensor([DENSITIES.index(s[0].density) for s in scenes]),
            answer=answer,
        )

    def _sequence(
        self, scenes: tuple[Scene, ...], mix: Mix, rng: np.random.Generator
    ) -> tuple[np.ndarray, ...]:
        prefix = self.start + self.image * len(scenes)
        size = -(-(len(prefix) + TEXT) // 8) * 8
        ids, kind = np.zeros(size, np.int64), np.full(size, -1, np.int64)
        turn, parent = np.full(size, PAD, np.int64), np.full(size, PREFIX, np.int64)
        position, answer = np.zeros(size, np.int64), np.zeros(size, np.float32)
        at = len(prefix)
        ids[:at], turn[:at], position[:at] = prefix, PREFIX, np.arange(at)
        number = 0
        for wanted in self._kinds(mix, rng):
            before, place = PREFIX, len(prefix)
            for text, told in self._tokens(ask(scenes, wanted, rng)):
                end = at + len(text) + len(told)
                if end > size:
                    return ids, turn, parent, position, kind, answer
                ids[at:end] = text + told
                turn[at:end], parent[at:end] = number, before
                position[at:end] = np.arange(place, place + end - at)
                kind[end - len(told) : end] = KINDS.index(wanted)
                answer[end - len(told) : end] = len(told) ** -0.5
                before, place, at, number = number, place + end - at, end, number + 1
        return ids, turn, parent, position, kind, answer

    def _kinds(self, mix: Mix, rng: np.random.Generator) -> Iterator[Kind]:
        while mix.kinds:
            yield from (mix.kinds[i] for i in rng.permutation(len(mix.kinds)))

    def _tokens(self, turns: list[Turn]) -> Iterator[tuple[list[int], list[int]]]:
        for number, (question, answer) in enumerate(turns):
            start = "USER: " if number else ""  # the first one's is before the images
            yield self.encode(f"{start}{question} ASSISTANT:"), [*self.encode(f" {answer}"), 2]


def _density(rng: np.random.Generator) -> Density:
    return DENSITIES[int(rng.choice(3, p=(0.25, 0.3, 0.45)))]


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Name, colour and place [IMAGE_TOKENS] of the thing whose box holds a patch's middle: numbers
    from 1, 0 for none."""
    name, colour, where = (np.zeros((PATCHES, PATCHES), np.int64) for _ in range(3))
    for thing in scene.things:
        left, top, right, bottom = ((v + PATCH // 2) // PATCH for v in thing.box)
        name[top:bottom, left:right] = 1 + NAMES.index(thing.name)
        colour[top:bottom, left:right] = 1 + list(COLOURS).index(thing.colour)
        where[top:bottom, left:right] = 1 + thing.place
    return name.ravel(), colour.ravel(), where.ravel()
