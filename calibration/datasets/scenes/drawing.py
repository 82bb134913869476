"""Images of things on a dark canvas, from one on a large quiet one to a full grid of nine.

A thing is a digit (handwritten or of a font), a letter, a word or a shape, in one of seven colours,
somewhere in its cell of a 3 x 3 grid. How much of an image matters is its density: that is what
decides what dropping or merging image tokens costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from lvlm.calibration.datasets.scenes.glyphs import DIGITS, LETTERS, SHAPES, WORDS, Split, mask

Density = Literal["sparse", "middle", "dense"]
DENSITIES: tuple[Density, ...] = ("sparse", "middle", "dense")
COUNTS: dict[Density, tuple[int, int]] = {"sparse": (1, 2), "middle": (3, 5), "dense": (9, 9)}

SIDE = 336  # pixels; 24 x 24 patches of 14, as LLaVA-1.5 has
PATCH = 14
CELL = SIDE // 3
ROWS = ("top", "middle", "bottom")
PLACES = (
    *("top left", "top centre", "top right"),
    *("middle left", "centre", "middle right"),
    *("bottom left", "bottom centre", "bottom right"),
)
COLOURS = {
    "red": (225, 45, 45),
    "orange": (240, 140, 35),
    "yellow": (240, 220, 60),
    "green": (50, 190, 70),
    "blue": (70, 115, 255),
    "purple": (190, 75, 230),
    "white": (240, 240, 240),
}
NAMES = (*DIGITS, *LETTERS, *SHAPES, *WORDS)


@dataclass(frozen=True)
class Thing:
    """``name`` in ``colour`` in cell ``place`` (0 to 8, row by row); its box in pixels."""

    name: str
    colour: str
    place: int
    box: tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Scene:
    """An image uint8 [336, 336, 3] and the things in it, in reading order."""

    image: np.ndarray
    things: tuple[Thing, ...]
    density: Density

    def at(self, place: int) -> Thing | None:
        return next((t for t in self.things if t.place == place), None)

    def unique(self) -> list[Thing]:
        """Things whose name no other has."""
        names = [t.name for t in self.things]
        return [t for t in self.things if names.count(t.name) == 1]


def draw_scene(rng: np.random.Generator, split: Split, density: Density) -> Scene:
    """A random scene; held-out ones contain no handwritten digit that training has seen."""
    low, high = COUNTS[density]
    count = int(rng.integers(low, high + 1))
    places = sorted(int(p) for p in rng.choice(9, size=count, replace=False))
    names = _names(rng, count)
    colours = list(COLOURS)
    if rng.random() < 0.5:  # few colours, so that counting them sees more than ones and twos
        colours = [str(c) for c in rng.choice(colours, size=int(rng.integers(1, 4)), replace=False)]
    canvas = _paper(rng)
    things = []
    for place, name in zip(places, names, strict=True):
        colour = colours[int(rng.integers(len(colours)))]
        things.append(Thing(name, colour, place, _draw(canvas, name, colour, place, rng, split)))
    return Scene(canvas.clip(0, 255).astype(np.uint8), tuple(things), density)


def _names(rng: np.random.Generator, count: int) -> list[str]:
    kinds = (DIGITS, LETTERS, SHAPES, WORDS)
    only = int(rng.choice(5, p=(0.25, 0.15, 0.12, 0.13, 0.35)))
    names = [
        str(rng.choice(kinds[only] if only < 4 else kinds[int(rng.integers(4))]))
        for _ in range(count)
    ]
    if rng.random() < 1 / 3:  # the same thing more than once
        pool = names[: int(rng.integers(1, 4))]
        names = [str(rng.choice(pool)) for _ in range(count)]
    return names


def _draw(
    canvas: np.ndarray, name: str, colour: str, place: int, rng: np.random.Generator, split: Split
) -> tuple[int, int, int, int]:
    room = (4, 13) if name in WORDS else 6  # to turn in
    image = ImageOps.expand(mask(name, rng, split), room)
    if name in WORDS:
        wide = int(rng.integers(82, 109))
        size = (wide, round(wide * image.height / image.width))
    else:
        high = int(rng.integers(40, 109))
        size = (high, high)
    image = image.resize(size, Image.Resampling.BICUBIC)
    image = image.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BILINEAR)
    left = CELL * (place % 3) + int(rng.integers(CELL - size[0] + 1))
    top = CELL * (place // 3) + int(rng.integers(CELL - size[1] + 1))
    box = (left, top, left + size[0], top + size[1])
    cover = np.asarray(image, np.float32)[..., None] / 255
    ink = np.array(COLOURS[colour], np.float32) + rng.uniform(-14, 14, size=3).astype(np.float32)
    part = canvas[box[1] : box[3], box[0] : box[2]]
    part += cover * (ink - part)
    return box


def _paper(rng: np.random.Generator) -> np.ndarray:
    """float32 [336, 336, 3]: dark, a little lighter to one side, with noise."""
    ramp = np.linspace(-0.5, 0.5, SIDE, dtype=np.float32)
    slopes = rng.uniform(-25, 25, size=2).astype(np.float32)
    y, x = (int(v) for v in rng.integers(_noise().shape[0] - SIDE, size=2))
    light = slopes[0] * ramp[:, None] + slopes[1] * ramp + _noise()[y : y + SIDE, x : x + SIDE]
    tint = rng.uniform(10, 55, size=3).astype(np.float32)
    paper: np.ndarray = light[..., None] + tint
    return paper


@cache
def _noise() -> np.ndarray:
    return np.random.default_rng(1).normal(0, 5, size=(1024, 1024)).astype(np.float32)
