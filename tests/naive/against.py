"""A bundle against its twin: tokens, logits and counts of every prompt, together and alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from settings import ASSETS
from twin_model import Answer, Twin
from twin_rules import NoRule

import lvlm
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions

IMAGE = "<image>\n"
IMAGES = [np.asarray(Image.open(ASSETS / f"samples/digits-{i}.png")) for i in (1, 2)]
Row = tuple[str, list[np.ndarray]]
# One image, none, several, next to nothing, an image before all text.
ROWS: list[Row] = [
    (f"USER: {IMAGE}Describe the picture. ASSISTANT:", IMAGES[:1]),
    ("USER: How often does 7 appear in a picture that nobody gave you? ASSISTANT:", []),
    (f"USER: {IMAGE}and {IMAGE}Which digit is in the top row? ASSISTANT:", IMAGES[::-1]),
    ("7", []),
    (f"{IMAGE}7", IMAGES[1:]),
]
# A token may differ where the two best are as near as this; logits must agree anyway.
TOLERANCE = 1e-3


def compare_steps(
    bundle: Path,
    twin: Twin,
    rule: Callable[[], NoRule],
    rows: list[Row],
    count: int,
    **ratios: Any,
) -> list[Answer]:
    """Both are fed the twin's tokens, so that a step is compared whatever went before."""
    expected = [twin.answer(prompt, images, rule(), count) for prompt, images in rows]
    with lvlm.load(bundle) as model:
        _compare(model, rows, expected, ratios)
        _compare(model, rows[:1], expected[:1], ratios)
    return expected


def _compare(model: Model, rows: list[Row], expected: list[Answer], ratios: dict[str, Any]) -> None:
    options = GenerationOptions(chat_template=False, max_new_tokens=len(expected[0].tokens))
    prompts = [model.prepare(0, text, images, options) for text, images in rows]
    batch = model.calls.start(prompts, **ratios)
    counts = batch.running[0].counts
    assert counts.prefill.entries.T.tolist() == [answer.entered for answer in expected]
    assert counts.kept.T.tolist() == [answer.kept for answer in expected]
    for step in range(len(expected[0].tokens)):
        theirs = torch.stack([answer.logits[step] for answer in expected]).numpy()
        limit = TOLERANCE * np.abs(theirs).max()
        np.testing.assert_allclose(batch.logits, theirs, rtol=0, atol=limit, err_msg=f"{step}")
        for answer, mine in zip(expected, batch.logits, strict=True):
            token = answer.tokens[step]
            assert mine.argmax() == token or mine.max() - mine[token] < 2 * limit, step
        if step + 1 < len(expected[0].tokens):
            batch.feed([answer.tokens[step] for answer in expected])
    left = (batch.cache.lengths - (batch.cache.victims >= 0)).T
    assert left.tolist() == [answer.lengths for answer in expected]
