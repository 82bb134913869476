"""What goes into the model: the bundle's pixels, texts and token ids against transformers' own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from lvlm.core.errors import LvlmError, PromptError
from lvlm.export.verify.checks import Check, difference
from lvlm.export.verify.judge import Judge
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
    "user, picture": [Turn("user", QUESTION, 1)],
    "system, user, picture": [Turn("system", SYSTEM), Turn("user", QUESTION, 1)],
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
TEXTS = (
    "Hello, world!",
    " two  spaces,\ta tab\nand a line",
    "Größe 12½ — naïve “quotes”",
    "東京 مرحبا привет 👩‍👧",
    "def f(x): return x**2  # code",
)
TOKENS_A_TEXT, AT_ONCE = 16, 64


def compare(
    judge: Judge,
    family: Family,
    maker: PromptMaker,
    picture: Image.Image,
    prompt: Prompt,
    pixels: bool,
) -> Iterator[Check]:
    """Checks of a bundle's ``maker`` against the checkpoint's own; ``prompt`` is QUESTION about the
    picture, as the bundle has it. ``pixels``: whether the bundle is to scale pictures alike."""
    odd = picture.resize((picture.width // 2 + 7, picture.height))
    if pixels:
        yield _pixels(judge, family, prompt, picture, "a picture")
        yield _pixels(judge, family, prepare(maker, odd), odd, "one of another shape")
        yield _ids(judge, maker, picture, prompt)
    yield from texts(judge, maker)


def texts(judge: Judge, maker: PromptMaker) -> Iterator[Check]:
    """Checks of the chat template and of the tokenizer."""
    if maker.template is not None or judge.template():
        yield from _roles(judge, maker)
    yield _corpus(judge, maker)
    yield _vocabulary(judge, maker)


def prepare(maker: PromptMaker, picture: Image.Image, tokens: int = 1) -> Prompt:
    """QUESTION about a picture; without a chat template it stands after the picture."""
    template = maker.template is not None
    text = QUESTION if template else f"{maker.images.token}\n{QUESTION}"
    options = GenerationOptions(max_new_tokens=tokens, chat_template=template)
    return maker.prepare(0, text, [picture], options)


def _pixels(judge: Judge, family: Family, prompt: Prompt, picture: Image.Image, what: str) -> Check:
    ours, theirs = family.transformers_inputs(prompt), judge.pixels(picture)
    worst = 0.0
    for name in sorted(set(ours) & set(theirs)):
        a, b = ours[name].reshape(-1), theirs[name].reshape(-1)
        same = len(a) == len(b)
        worst = max(worst, float((a.double() - b.double()).abs().max()) if same else np.inf)
    if "pixel_values" not in theirs or "pixel_values" not in ours:
        worst = np.inf
    return Check(f"pixels of {what}", worst, PIXELS, "apart")


def _roles(judge: Judge, maker: PromptMaker) -> Iterator[Check]:
    """Conversations as the chat template writes them, and their token ids."""
    wrong = compared = 0
    for name, turns in CONVERSATIONS.items():
        theirs = judge.render(turns)
        try:
            ours = maker.template.render_turns(turns) if maker.template else None
        except LvlmError:
            ours = None  # what the template refuses, both refuse
        yield Check(f"chat template: {name}", float(ours != theirs), 0, "texts that differ")
        if ours is not None and theirs is not None:
            expected = judge.encode(theirs, not judge.begins(theirs))
            made = maker.tokenizer.encode(ours, add_special_tokens=not maker.begins(ours))
            wrong += _unequal(made, expected)
            compared += 1
    yield Check(f"ids of {compared} conversations", wrong, 0, "ids that differ")


def _ids(judge: Judge, maker: PromptMaker, picture: Image.Image, prompt: Prompt) -> Check:
    """Of the whole prompt; without transformers' processor with every picture's tokens as one."""
    token = maker.images.token
    text = judge.render([Turn("user", QUESTION, 1)]) if maker.template else f"{token}\n{QUESTION}"
    if text is None:
        return Check("prompt's ids", np.inf, 0, "ids that differ")
    theirs = judge.ids(text, picture)
    ours: list[int] = list(prompt.ids)
    name = "prompt's ids"
    if theirs is None:
        theirs = judge.encode(text, not judge.begins(text))
        first = int(np.flatnonzero(prompt.image_id > 0)[0])
        plain = [t for t, m in zip(ours, prompt.image_id, strict=True) if m == 0]
        before = theirs.index(maker.images.token_id) if maker.images.token_id in theirs else -1
        theirs = [t for t in theirs if t != maker.images.token_id]
        # What a processor writes around a picture is not known here: the ends must agree
        ends = before >= 0 and ours[: min(before, first)] == theirs[: min(before, first)]
        ends = ends and plain[len(plain) - len(theirs) + before :] == theirs[before:]
        return Check(f"{name}, picture aside", float(not ends), 0, "ids that differ")
    return Check(name, _unequal(ours, theirs), 0, "ids that differ")


def _corpus(judge: Judge, maker: PromptMaker) -> Check:
    """A few texts in many scripts, and every added token with text around it."""
    added = sorted(judge.tokenizer.get_added_vocab(), key=str)
    groups = [added[i : i + TOKENS_A_TEXT] for i in range(0, len(added), TOKENS_A_TEXT)]
    texts = [*TEXTS, *(f"{' a'.join(g)} b {'c '.join(g)}" for g in groups)]
    wrong = 0
    for text in texts:
        for special in (True, False):
            try:
                ours = maker.tokenizer.encode(text, add_special_tokens=special)
            except PromptError:
                ours = []
            wrong += ours != judge.encode(text, special)
    return Check(
        f"tokenizer: {len(texts)} texts, {len(added)} added tokens", wrong, 0, "texts that differ"
    )


def _vocabulary(judge: Judge, maker: PromptMaker) -> Check:
    """Every token: its text in both tokenizers, and what these make of that text."""
    count = len(judge.tokenizer)
    wrong = 0
    for first in range(0, count, AT_ONCE):
        ids = list(range(first, min(first + AT_ONCE, count)))
        text = judge.decode(ids)
        same = maker.tokenizer.decode(ids) == text
        wrong += not (same and maker.tokenizer.encode(text, False) == judge.encode(text, False))
    return Check(f"tokenizer: its {count} tokens", wrong, 0, "texts that differ")


def _unequal(ours: list[int], theirs: list[int]) -> int:
    return sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))


def eos(judge: Judge, ours: tuple[int, ...]) -> Check:
    """Ids that end an answer: the bundle's and those of generate."""
    return Check("end-of-text ids", len(set(ours) ^ judge.eos_ids), 0, "ids that differ")


def features(ours: np.ndarray, theirs: torch.Tensor) -> float:
    """How far a picture's rows are apart."""
    return difference(ours, theirs.numpy()) if ours.shape == tuple(theirs.shape) else np.inf
