"""Prompts, images and options of a call: of any type, any text, any value."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from campaign.case import Base, Case
from campaign.gen_images import model_of
from campaign.mutate import ODD

WEIGHT = 20
WARM = ("lvlm.runtime.model",)
WORDS = (
    "What",
    "is",
    " it",
    "?",
    "<image>",
    "</s>",
    "<s>",
    "<pad>",
    "\n",
    "\0",
    "\ud800",
    "é",
    "日本",
)
MORE = ("🙂", "\u202e", "{{ 1 }}", "{% for %}", "USER: ", "ASSISTANT:", "<|im_end|>", "a" * 20, " ")


def make(rng: random.Random, folder: Path, base: Base) -> Case:  # noqa: ARG001
    from lvlm.runtime.options.generation_options import GenerationOptions

    names = list(GenerationOptions.__dataclass_fields__)
    given = {name: _value(rng) for name in rng.sample(names, rng.choice((0, 0, 1, 2)))}
    if rng.random() < 0.03:
        given["no_such_option"] = 1
    given.setdefault("max_new_tokens", rng.choice((1, 2, 3)))
    prompt, images = _prompt(rng), _images(rng, base)

    def call() -> None:
        model = model_of(base.bundle)
        if rng.random() < 0.3:
            for _ in model.stream(prompt, images, **given):
                pass
        else:
            model.generate(prompt, images, **given)

    return Case("generate", (repr(prompt)[:200], repr(images)[:80], repr(given)[:200]), call)


def _text(rng: random.Random) -> str:
    if rng.random() < 0.02:
        return rng.choice(WORDS) * 30_000
    return "".join(rng.choices(WORDS + MORE, k=rng.randint(0, 12)))


def _prompt(rng: random.Random) -> Any:
    if rng.random() < 0.75:
        return _text(rng)
    if rng.random() < 0.5:
        return [_text(rng) for _ in range(rng.randint(0, 3))]
    return rng.choice((*ODD, b"bytes", bytearray(b"x"), object(), [1], [None], ("a", "b"), {"a"}))


def _images(rng: random.Random, base: Base) -> Any:
    image = str(rng.choice(base.images))
    if rng.random() < 0.6:
        return rng.choice(([], [image], (image,), None))
    return rng.choice(
        (image, [[image]], [[image], []], [image] * 3, [None], [[]], 5, {}, b"", [5], "x")
    )


def _value(rng: random.Random) -> Any:
    import numpy as np

    usual = (0, 1, 2, 0.5, 0.9, 1.0, True, False, None, "a", ["a"], [0.5], "</s>", "\n")
    scalars = (np.int64(3), np.float32(0.5), np.bool_(True), np.array(2), np.array([0.5, 0.5]))
    return rng.choice((*usual, *usual, *usual, *scalars, *ODD))
