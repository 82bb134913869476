"""Glyphs of things: letters and digits of several fonts, handwritten digits, shapes, words.

scripts/draw_glyphs.py makes glyphs.png anew.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

BICUBIC = Image.Resampling.BICUBIC
Split = Literal["train", "heldout"]

ATLAS = Path(__file__).with_name("glyphs.png")
TILE = 48
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
)
DIGITS = tuple("0123456789")
CHARACTERS = "".join(DIGITS) + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTERS = tuple("ABCDEFGHJKLMNPQRSTUVWXYZ")  # O and I look like digits
SHAPES = ("circle", "ring", "square", "triangle", "diamond", "star", "cross", "heart")
WORDS = (
    *("TREE", "FISH", "BIRD", "MOON", "RAIN", "WIND", "SHIP", "DOOR"),
    *("LAMP", "BOOK", "HAND", "MILK", "SALT", "GOLD", "ROCK", "LEAF"),
    *("SUN", "CAT", "DOG", "KEY", "MAP", "CUP", "HAT", "BOX"),
)
HELDOUT_FRACTION = 0.2


def mask(name: str, rng: np.random.Generator, split: Split) -> Image.Image:
    """Coverage of each pixel by a thing, 0 to 255, before it is enlarged and turned."""
    if name in SHAPES:
        return _shape(name)
    font = int(rng.integers(len(FONTS)))
    if name in WORDS:
        return _word(name, font)
    if name in DIGITS and rng.random() < 0.5:
        scans, labels = _scans(split)
        scan = scans[rng.choice(np.flatnonzero(labels == int(name)))]
        return Image.fromarray((scan * 255 / 16).astype(np.uint8)).resize((TILE, TILE), BICUBIC)
    return Image.fromarray(_atlas()[font, CHARACTERS.index(name)])


def _word(word: str, font: int) -> Image.Image:
    gap = np.zeros((TILE, 5), np.uint8)
    parts = []
    for letter in word:
        tile = _atlas()[font, CHARACTERS.index(letter)]
        inked = np.flatnonzero(tile.max(0))
        parts += [tile[:, inked[0] : inked[-1] + 1], gap]
    return Image.fromarray(np.hstack(parts[:-1]))


@cache
def _shape(name: str) -> Image.Image:
    size = 384  # drawn large, then made small: smooth edges
    image = Image.new("L", (size, size))
    draw, box = ImageDraw.Draw(image), (8, 8, size - 8, size - 8)
    middle = size / 2
    if name == "circle":
        draw.ellipse(box, 255)
    elif name == "ring":
        draw.ellipse(box, 255)
        draw.ellipse((96, 96, size - 96, size - 96), 0)
    elif name == "square":
        draw.rectangle((24, 24, size - 24, size - 24), 255)
    elif name == "triangle":
        draw.polygon([(middle, 12), (size - 8, size - 24), (8, size - 24)], 255)
    elif name == "diamond":
        draw.polygon([(middle, 4), (size - 60, middle), (middle, size - 4), (60, middle)], 255)
    elif name == "star":
        turns = [math.pi * (i / 5 - 0.5) for i in range(10)]
        far = [(1.0, 0.42)[i % 2] * (middle - 6) for i in range(10)]
        points = zip(far, turns, strict=True)
        draw.polygon([(middle + r * math.cos(t), middle + r * math.sin(t)) for r, t in points], 255)
    elif name == "cross":
        draw.rectangle((middle - 56, 12, middle + 56, size - 12), 255)
        draw.rectangle((12, middle - 56, size - 12, middle + 56), 255)
    else:
        draw.ellipse((12, 20, middle + 14, 220), 255)
        draw.ellipse((middle - 14, 20, size - 12, 220), 255)
        draw.polygon([(24, 160), (size - 24, 160), (middle, size - 8)], 255)
    return image.resize((96, 96), Image.Resampling.LANCZOS)


@cache
def _atlas() -> np.ndarray:
    """uint8 [fonts, characters, TILE, TILE]."""
    image = np.asarray(Image.open(ATLAS))
    tiles = image.reshape(len(FONTS), TILE, len(CHARACTERS), TILE)
    return tiles.transpose(0, 2, 1, 3)


@cache
def _scans(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Scans [n, 8, 8] in 0..16 of real handwritten digits and their labels [n]; held-out scans are
    never trained on."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    cut = int(len(order) * HELDOUT_FRACTION)
    chosen = order[:cut] if split == "heldout" else order[cut:]
    return data.images[chosen], data.target[chosen]
