"""What an answer tells of its images is the same, however its prompt was read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from engine_tools import IMAGES, same_images

import lvlm
from lvlm.runtime.engine import Engine
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.model import Model

OPTIONS: dict[str, Any] = {"max_new_tokens": 3, "keep": 0.3, "chat_template": False}
QUESTIONS = ["USER: <image>\n{} ASSISTANT:", "USER: <image>\n<image>\n{} ASSISTANT:"]


def asked(by: Engine | Model, question: str, *images: int, **options: Any) -> Generation:
    text = QUESTIONS[len(images) - 1].format(question)
    found: Generation = by.generate(text, [IMAGES[i] for i in images], **(OPTIONS | options))
    return found


def test_behind_a_shared_beginning(bundle: Callable[..., Path]) -> None:
    """Of both images, of one, or of less than that; and of further answers."""
    folder = bundle("digits-llava", "visionzip", max_images=2)
    with lvlm.load(folder) as model, Engine(folder, slots=3) as engine:
        whole = model.manifest.images.tokens
        for question, images, reuses in (
            ("What is it?", (0, 1), False),
            ("What is it, and why?", (0, 1), True),
            ("Which digit?", (0,), True),
            ("Which digit?", (0, 0), True),
            ("Which digit?", (1,), False),
        ):
            ours = asked(engine, question, *images, n=2, temperature=1.0)
            theirs = asked(model, question, *images)
            assert bool(ours.stats.reused_tokens > 10) == reuses
            for one in (ours, *ours.others):
                same_images(one, theirs)
            assert [len(image.rows) for image in ours.images] == [round(0.3 * whole)] * len(images)
        everything = asked(engine, "What is it?", 0, keep=1.0).images
        assert [image.rows.tolist() for image in everything] == [list(range(whole))]


def test_of_several_prompts_at_once(bundle: Callable[..., Path]) -> None:
    with lvlm.load(bundle("digits-llava", "visionzip", max_images=2)) as model:
        texts = [QUESTIONS[1].format("Why?"), "USER: Hi ASSISTANT:", QUESTIONS[0].format("Why?")]
        several = model.generate(texts, [IMAGES, [], IMAGES[1:]], **OPTIONS)
        alone = [asked(model, "Why?", 0, 1), asked(model, "Why?", 1)]
        for ours, theirs in zip((several[0], several[2]), alone, strict=True):
            np.testing.assert_equal(ours.images, theirs.images)
        assert several[1].images == []


def test_in_a_conversation(bundle: Callable[..., Path]) -> None:
    """A later turn's image is not merged, and what was merged before is told again."""
    folder = bundle("digits-llava", "hybrid", max_images=2, sessions=True)
    options = OPTIONS | {"chat_template": True}
    with Engine(folder, slots=1) as engine, engine.session() as session:
        talk: list[dict[str, Any]] = []
        found = []
        for question, image in (("What is it?", 0), ("And this?", 1), ("Why?", None)):
            shown = [] if image is None else [{"type": "image", "image": str(IMAGES[image])}]
            talk.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
            found.append(engine.generate(talk, session=session, **options))
            talk.append({"role": "assistant", "content": found[-1].text})
    first, second, third = found
    assert third.stats.reused_tokens > second.stats.reused_tokens > first.stats.reused_tokens == 0
    assert [len(answer.images) for answer in found] == [1, 2, 2]
    (seen,) = first.images
    np.testing.assert_equal(second.images[0], seen)
    np.testing.assert_equal(third.images, second.images)
    (merged,) = first.merge_maps
    assert (merged < 0).any() or len(set(merged.tolist())) < len(merged)
    for later in (second, third):
        (full,) = later.merge_maps
        assert len(full) == len(later.image_id) == later.stats.prompt_tokens
        np.testing.assert_equal(full[: len(merged)], merged)
        behind = full[len(merged) :]
        np.testing.assert_equal(behind, merged.max() + 1 + np.arange(len(behind)))
