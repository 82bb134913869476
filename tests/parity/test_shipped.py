"""The shipped model: recipe none answers as transformers does, and right; merging to 35 % right as
well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bundles import their_answer, transformers_inputs
from parity_tools import load_torch
from PIL import Image
from settings import SHIPPED

import lvlm
from lvlm.runtime.options.generation_options import GenerationOptions

SAMPLES = [
    np.asarray(Image.open(SHIPPED.parent / f"samples/digits-{number}.png")) for number in (1, 2)
]
ASKED = {
    "Read the top row.": ["8, 0, 9", "nothing, 3, 0"],
    "Read everything.": ["8, 0, 9, 1, 2, 8, 5, 0, 6", "3, 0, 4, 2, 7"],
}


@pytest.mark.parametrize("recipe", [("none",), ("lightvlm",)])
def test_the_sample_images_are_read(recipe: tuple[str, ...], bundle: Callable[..., Path]) -> None:
    rows = [(question, [image]) for question in ASKED for image in SAMPLES]
    with lvlm.load(bundle("tiny-llava", *recipe, max_images=2)) as model:
        answers = model.generate(*map(list, zip(*rows, strict=True)), max_new_tokens=40)
        if recipe == ("none",):
            theirs = load_torch(SHIPPED)
            for row, answer in zip(rows, answers, strict=True):
                prompt = model.prepare(0, *row, GenerationOptions())
                given = transformers_inputs(SHIPPED, prompt)
                expected = their_answer(theirs, prompt.ids, given, max_new_tokens=40)
                assert answer.token_ids == expected
    wanted = [answer for pair in ASKED.values() for answer in pair]
    assert [answer.text.strip() for answer in answers] == wanted
