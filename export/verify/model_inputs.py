"""Comparison of the model's inputs: the bundle's pixels, texts and token ids against transformers'
own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from lvlm.core.errors import LvlmError
from lvlm.export.verify import vocabulary
from lvlm.export.verify.checks import Check, difference
from lvlm.export.verify.judge import Judge
from lvlm.export.verify.outcome import ValidationOutcome
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.chat_template import Turn
from lvlm.runtime.prompt.prompts import Prompt, PromptMaker

if TYPE_CHECKING:
    from lvlm.export.families.family import Family

QUESTION = "Describe the picture."
SYSTEM = "You are an assistant. Answer briefly."
ANSWER, NEXT = "A grid of digits,\nseven in all.", " And the last one?"
CONVERSATIONS = {
    "user": [Turn("user", QUESTION)],
    "user, image": [Turn("user", QUESTION, 1)],
    "system, user, image": [Turn("system", SYSTEM), Turn("user", QUESTION, 1)],
    "after an answer": [
        Turn("user", QUESTION, 1),
        Turn("assistant", ANSWER),
        Turn("user", NEXT),
    ],
    "system, two answers": [
        Turn("system", SYSTEM),
        *(Turn("user", QUESTION, 1), Turn("assistant", ANSWER)),
        *(Turn("user", NEXT, 1), Turn("assistant", ANSWER)),
        Turn("user", QUESTION),
    ],
}
PIXELS = 1e-4  # of values around 1, whose steps are 0.015


def compare(
    judge: Judge,
    family: Family,
    maker: PromptMaker,
    image: Image.Image,
    prompt: Prompt,
    pixels: bool,
) -> ValidationOutcome:
    """A bundle's ``maker`` against the checkpoint's own; ``prompt`` is QUESTION about the
    image, as the bundle has it. ``pixels``: whether the bundle is to scale images alike."""
    outcome, odd = ValidationOutcome(), image.resize((image.width // 2 + 7, image.height))
    if pixels and judge.images is not None:
        outcome.checks += [
            _pixels(judge, family, prompt, image, "an image"),
            _pixels(judge, family, prepare(maker, odd), odd, "one of another shape"),
        ]
    if pixels:
        outcome.checks.append(_ids(judge, maker, image, prompt))
    outcome.add(texts(judge, maker, prompt.ids))
    return outcome


def texts(judge: Judge, maker: PromptMaker, ids: Iterable[int] = ()) -> ValidationOutcome:
    """The chat template and the tokenizer; ``ids``: of a prompt with an image."""
    outcome, used = ValidationOutcome(), {*map(int, ids), *judge.eos_ids, *maker.tokenizer.eos_ids}
    if maker.template is not None or judge.template():
        used |= _roles(judge, maker, outcome)
    outcome.add(vocabulary.compare(judge, maker, used))
    return outcome


def prepare(
    maker: PromptMaker, image: Image.Image, tokens: int = 1, *, template: bool | None = None
) -> Prompt:
    """QUESTION about an image; without a chat template, where there is none or as ``template``
    says, it stands after the image."""
    template = maker.template is not None if template is None else template
    options = GenerationOptions(max_new_tokens=tokens, chat_template=template)
    return maker.prepare(0, question(maker.images.token, template=template), [image], options)


def question(token: str, *, template: bool) -> str:
    """QUESTION as it is given; ``token``: stands for the image where no template places it."""
    return QUESTION if template else f"{token}\n{QUESTION}"


def _pixels(judge: Judge, family: Family, prompt: Prompt, image: Image.Image, what: str) -> Check:
    ours, theirs = family.transformers_inputs(prompt), judge.pixels(image)
    worst = 0.0
    for name in sorted(set(ours) & set(theirs)):
        a, b = ours[name].reshape(-1), theirs[name].reshape(-1)
        same = len(a) == len(b)
        worst = max(worst, float((a.double() - b.double()).abs().max()) if same else np.inf)
    if "pixel_values" not in theirs or "pixel_values" not in ours:
        worst = np.inf
    level = 0.0 if judge.exact else 1.01 / 255 / min(judge.images.image_std)
    return Check(f"pixels of {what}", worst, PIXELS + level, "apart")


def _roles(judge: Judge, maker: PromptMaker, outcome: ValidationOutcome) -> set[int]:
    """Conversations as the chat template writes them, and their token ids, which it returns."""
    wrong = compared = 0
    used: set[int] = set()
    for name, turns in CONVERSATIONS.items():
        theirs = judge.render(turns)
        try:
            ours = maker.template.render_turns(turns) if maker.template else None
        except LvlmError:
            ours = None  # what the template refuses, both refuse
        outcome.checks.append(
            Check(f"chat template: {name}", float(ours != theirs), 0, "texts that differ")
        )
        if ours is not None and theirs is not None:
            expected = judge.encode(theirs, not judge.begins(theirs))
            made = maker.tokenizer.encode(ours, add_special_tokens=not maker.begins(ours))
            wrong += _unequal(made, expected)
            used.update(made, expected)
            compared += 1
    outcome.checks.append(Check(f"ids of {compared} conversations", wrong, 0, "ids that differ"))
    return used


def _ids(judge: Judge, maker: PromptMaker, image: Image.Image, prompt: Prompt) -> Check:
    """Ids of the whole prompt; without transformers' processor with every image's tokens as one."""
    token = maker.images.token
    text = (
        judge.render([Turn("user", QUESTION, 1)])
        if maker.template
        else question(token, template=False)
    )
    if text is None:
        return Check("prompt's ids", np.inf, 0, "ids that differ")
    theirs = judge.ids(text, image)
    ours: list[int] = list(prompt.ids)
    name = "prompt's ids"
    if theirs is None:
        theirs = judge.encode(text, not judge.begins(text))
        first = int(np.flatnonzero(prompt.image_id > 0)[0])
        plain = [t for t, m in zip(ours, prompt.image_id, strict=True) if m == 0]
        place = maker.tokenizer.token_id(token)
        before = theirs.index(place) if place in theirs else -1
        theirs = [t for t in theirs if t != place]
        # What a processor writes around an image is not known here: the ends must agree
        ends = before >= 0 and ours[: min(before, first)] == theirs[: min(before, first)]
        ends = ends and plain[len(plain) - len(theirs) + before :] == theirs[before:]
        return Check(f"{name}, image aside", float(not ends), 0, "ids that differ")
    return Check(name, _unequal(ours, theirs), 0, "ids that differ")


def _unequal(ours: list[int], theirs: list[int]) -> int:
    return sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))


def eos(judge: Judge, ours: tuple[int, ...]) -> Check:
    """Ids that end an answer: the bundle's and those of generate."""
    return Check("end-of-text ids", len(set(ours) ^ judge.eos_ids), 0, "ids that differ")


def features(ours: np.ndarray, theirs: torch.Tensor) -> float:
    """Difference of an image's rows from transformers'."""
    return difference(ours, theirs.numpy()) if ours.shape == tuple(theirs.shape) else np.inf
