"""The built-in task: images of digits, letters, words and shapes, and questions about them.

Images are of three densities, from one thing on a large quiet canvas to nine, which decides what
dropping or merging image tokens costs. Half of the digits are handwritten, from scikit-learn's
``load_digits`` (1,797 real scans), split once into ``train`` and ``heldout``: a held-out image
contains no scan that training has seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, cast

import numpy as np

from lvlm.calibration.datasets.evaluation_samples import (
    DataError,
    Dataset,
    EvaluationRequest,
    EvaluationSample,
)
from lvlm.calibration.datasets.scenes.drawing import DENSITIES, Scene, draw_scene
from lvlm.calibration.datasets.scenes.glyphs import Split
from lvlm.calibration.datasets.scenes.questions import KINDS, Kind, Turn, ask
from lvlm.core.installing import install

# Those of which tiny-llava knows more than nine in ten; the others are asked by name
REACHED: tuple[Kind, ...] = ("read", "row", "list", "describe")
DEFAULT_SAMPLES = 120  # of an evaluation


@dataclass(frozen=True)
class AskedScene:
    """A question of a kind about one image, or two, and its exact answer; ``before``: the first
    question of a conversation, and its answer."""

    scenes: tuple[Scene, ...]
    kind: Kind
    question: str
    answer: str
    before: tuple[Turn, ...] = ()


def samples(
    split: Split, count: int, *, seed: int = 0, kinds: Sequence[Kind] = KINDS
) -> Iterator[AskedScene]:
    """``count`` reproducible questions, kinds and, more slowly, densities in turn.

    Args:
        split: ``train`` or ``heldout``.
        count: how many.
        seed: other images and questions.
        kinds: which.

    Yields:
        Questions, with images uint8 [336, 336, 3].
    """
    rng = np.random.default_rng([seed, 0 if split == "train" else 1])
    for number in range(count):
        kind = kinds[number % len(kinds)]
        density = DENSITIES[number // len(kinds) % len(DENSITIES)]
        images = 2 if kind == "pictures" else 1
        scenes = tuple(draw_scene(rng, split, density) for _ in range(images))
        *before, (question, answer) = ask(scenes, kind, rng)
        yield AskedScene(scenes, kind, question, answer, tuple(before))


class Digits(Dataset):
    """Data set ``digits``: questions about held-out images, of the kinds that tiny-llava answers
    best or of those wanted."""

    name: ClassVar[str] = "digits"
    summary: ClassVar[str] = "built-in: images of digits, letters, words and shapes"
    kinds: ClassVar[tuple[str, ...]] = KINDS

    def read(self, request: EvaluationRequest) -> list[EvaluationSample]:
        if find_spec("sklearn") is None:
            raise DataError(f"the data set 'digits' needs scikit-learn; {install('calibration')}")
        kinds = cast("tuple[Kind, ...]", request.kinds or REACHED)
        drawn = samples("heldout", request.samples or DEFAULT_SAMPLES, kinds=kinds)
        return [
            EvaluationSample(
                f"{n}-{asked.kind}-{asked.scenes[0].density}",
                tuple(scene.image for scene in asked.scenes),
                asked.question,
                asked.answer,
                f"digits sample {n}",
                asked.before,
            )
            for n, asked in enumerate(drawn, 1)
        ]


DATASET = Digits()
