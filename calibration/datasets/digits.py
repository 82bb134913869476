"""The built-in task: grids of real handwritten digits and questions about them.

Every image is a 3 x 3 grid of 8 x 8 scans from scikit-learn's ``load_digits`` (1,797 real
handwritten digits), each enlarged, turned and moved a little inside its cell. The information is
spread over the whole image, which is the hard case for dropping or merging image tokens.

The scans are split once into ``train`` and ``heldout``; a held-out image contains no scan that
training has seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import ClassVar, Literal, cast, get_args

import numpy as np
from PIL import Image

from lvlm.calibration.datasets.samples import (
    DataError,
    Dataset,
    EvaluationRequest,
    EvaluationSample,
)
from lvlm.core.installing import install

Split = Literal["train", "heldout"]
Kind = Literal["cell", "row", "count", "describe"]

SIDE = 168  # pixels; 12 x 12 patches of 14
GRID = 3
CELL = SIDE // GRID
ROW_NAMES = ("top", "middle", "bottom")
COLUMN_NAMES = ("left", "centre", "right")
HELDOUT_FRACTION = 0.2
DEFAULT_SAMPLES = 100  # of an evaluation


@dataclass(frozen=True)
class Question:
    """One question about a grid and its exact answer."""

    kind: Kind
    question: str
    answer: str


@dataclass(frozen=True)
class Grid:
    """An image uint8 [168, 168, 3] and the nine digits in it, row by row."""

    image: np.ndarray
    digits: tuple[int, ...]


def samples(
    split: Split, count: int, *, seed: int = 0, kinds: tuple[Kind, ...] | None = None
) -> Iterator[tuple[Grid, Question]]:
    """Yield ``count`` reproducible (grid, question) pairs, the kinds in turn."""
    rng = np.random.default_rng([seed, 0 if split == "train" else 1])
    wanted = kinds or ("cell", "row", "count", "describe")
    for i in range(count):
        grid = draw_grid(rng, split)
        yield grid, ask(grid, wanted[i % len(wanted)], rng)


def ask(grid: Grid, kind: Kind, rng: np.random.Generator) -> Question:
    """One random question of the given kind."""
    rows = [grid.digits[r * GRID : (r + 1) * GRID] for r in range(GRID)]
    if kind == "cell":
        r, c = (int(x) for x in rng.integers(GRID, size=2))
        question = f"Which digit is in the {ROW_NAMES[r]} row, {COLUMN_NAMES[c]} column?"
        return Question(kind, question, str(rows[r][c]))
    if kind == "row":
        r = int(rng.integers(GRID))
        return Question(kind, f"Read the {ROW_NAMES[r]} row.", " ".join(map(str, rows[r])))
    if kind == "count":
        # Mostly digits that are there, else nearly every answer would be 0.
        present = rng.random() < 0.8
        digit = int(rng.choice(grid.digits)) if present else int(rng.integers(10))
        # The answer reads each row before it counts, so that no step is a leap for a small model.
        tally = ", ".join(f"{' '.join(map(str, row))}: {row.count(digit)}" for row in rows)
        answer = f"{tally}. In all {grid.digits.count(digit)}."
        return Question(kind, f"How often does {digit} appear?", answer)
    lines = (
        f"The {name} row is {a}, {b} and {c}."
        for name, (a, b, c) in zip(ROW_NAMES, rows, strict=True)
    )
    return Question(
        kind,
        "Describe the picture.",
        "The picture shows a grid of nine handwritten digits. " + " ".join(lines),
    )


def draw_grid(rng: np.random.Generator, split: Split) -> Grid:
    """A random grid; digits are uniform over 0-9, with repeats."""
    scans, labels = _scans(split)
    # A third of the grids draw from few digits, so that counting sees more than ones and twos.
    pool = rng.choice(10, size=int(rng.integers(2, 5)), replace=False)
    digits = rng.choice(pool, size=9) if rng.random() < 1 / 3 else rng.integers(10, size=9)
    ink = np.zeros((SIDE, SIDE), np.float32)
    for cell, digit in enumerate(digits):
        scan = scans[rng.choice(np.flatnonzero(labels == digit))]
        glyph = _glyph(scan, rng)
        side = glyph.shape[0]
        top = CELL * (cell // GRID) + int(rng.integers(CELL - side + 1))
        left = CELL * (cell % GRID) + int(rng.integers(CELL - side + 1))
        ink[top : top + side, left : left + side] = glyph
    paper = rng.uniform(0, 70, size=3)
    colour = rng.uniform(170, 255, size=3)
    canvas = paper + ink[..., None] * (colour - paper) + rng.normal(0, 5, size=(SIDE, SIDE, 1))
    return Grid(canvas.clip(0, 255).astype(np.uint8), tuple(int(d) for d in digits))


def _glyph(scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The 8 x 8 scan as a float [side, side] in 0..1, enlarged to 38-46 pixels, turned a little."""
    side = int(rng.integers(38, 47))
    image = Image.fromarray((scan * 255 / 16).astype(np.uint8))
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    image = image.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32) / 255


@cache
def _scans(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Scans [n, 8, 8] in 0..16 and their labels [n]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    cut = int(len(order) * HELDOUT_FRACTION)
    chosen = order[:cut] if split == "heldout" else order[cut:]
    return data.images[chosen], data.target[chosen]


class Digits(Dataset):
    """Data set ``digits``: questions of all kinds, or of those wanted, about held-out images."""

    name: ClassVar[str] = "digits"
    summary: ClassVar[str] = "built-in: 3 x 3 grids of real handwritten digits"
    kinds: ClassVar[tuple[str, ...]] = get_args(Kind)

    def read(self, request: EvaluationRequest) -> list[EvaluationSample]:
        if find_spec("sklearn") is None:
            raise DataError(f"the data set 'digits' needs scikit-learn; {install('calibration')}")
        kinds = cast(tuple[Kind, ...], request.kinds or self.kinds)
        drawn = samples("heldout", request.samples or DEFAULT_SAMPLES, kinds=kinds)
        return [
            EvaluationSample(
                f"{n}-{q.kind}", (grid.image,), q.question, q.answer, f"digits sample {n}"
            )
            for n, (grid, q) in enumerate(drawn, 1)
        ]


DATASET = Digits()
