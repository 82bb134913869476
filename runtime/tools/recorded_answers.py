"""Answers recorded when a bundle was made, and whether a device gives them too.

An export that is compared with its checkpoint leaves in validation.json what the bundle itself says
of a shipped image, in fp32 over its weights: a machine without torch, and without ONNX Runtime,
can tell in a minute whether its engines compute that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lvlm.core.errors import BundleError, LvlmError, shown
from lvlm.core.typed_json import decode, read_json
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions

FILE, FIELD = "validation.json", "answers"
SAMPLES = "samples"  # the folder of lvlm.assets
HIGHEST = 16  # logits of a step that are recorded
# Largest |difference| over the largest |logit|: rounding, and sums in another order
LIMITS: Mapping[str, float] = {"float32": 1e-2, "float16": 5e-2, "bfloat16": 1e-1}
QUANTIZED = 1e-1  # what multiplies int4 and int8 weights rounds on the way, each in its own manner
HELD_IN_8_BITS = 2e-2  # a number of an int8 cache may be rounded the other way


@dataclass(frozen=True)
class RecordedStep:
    """The highest logits of a step, falling: ``ids`` of the vocabulary, ``logits`` of these."""

    ids: tuple[int, ...]
    logits: tuple[float, ...]


@dataclass(frozen=True)
class RecordedAnswer:
    """Answer of a bundle about ``image``, a file of lvlm.assets, and ``text``.

    ids      token ids of the whole prompt
    tokens   what is fed, a token a step, whatever is chosen
    steps    one before each of ``tokens``
    """

    image: str
    text: str
    chat_template: bool
    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    steps: tuple[RecordedStep, ...]


@dataclass
class Comparison:
    """A recorded answer beside a device's: ``problem`` where it gave none, ``apart`` the largest
    difference of a step's logits over the largest logit, ``unlike`` the tokens that differ though
    the record is not undecided between the two."""

    answer: RecordedAnswer
    limit: float
    problem: str = ""
    apart: list[float] = field(default_factory=list)
    unlike: int = 0

    @property
    def passed(self) -> bool:
        return not self.problem and not self.unlike and max(self.apart) <= self.limit

    def __str__(self) -> str:
        if self.problem:
            return f"✗ {self.answer.image}: {self.problem}"
        steps = len(self.answer.steps)
        return (
            f"{'✓' if self.passed else '✗'} {self.answer.image}: {steps - self.unlike} of {steps} "
            f"tokens, logits at most {max(self.apart):.2g} of the largest apart (limit "
            f"{self.limit:g})"
        )


def highest(logits: np.ndarray) -> RecordedStep:
    """The record of a step's ``logits`` [vocabulary]."""
    ids = np.argsort(logits, kind="stable")[::-1][:HIGHEST]
    return RecordedStep(tuple(map(int, ids)), tuple(float(x) for x in logits[ids]))


def recorded_answers(folder: Path, manifest: Manifest) -> list[RecordedAnswer]:
    """Those of a bundle. Raises BundleError where it has none."""
    found: Any = None
    if FILE in manifest.files:
        written = read_json(folder / FILE)
        found = written.get(FIELD) if isinstance(written, dict) else None
    if not found:
        reason = "it was exported with --no-validate, or by an older version"
        raise BundleError(f"{folder} holds no recorded answers: {reason}; export it again")
    kind, where = tuple[RecordedAnswer, ...], f"{folder / FILE}: {FIELD}"
    answers = list(decode(kind, found, where))
    for number, answer in enumerate(answers):
        if wrong := _wrong(answer, manifest.text.vocab):
            raise BundleError(f"{where}[{number}] {wrong}; export the bundle again")
    return answers


def _wrong(answer: RecordedAnswer, vocab: int) -> str:
    """Fault that no export writes, in words; nobody vouches for the file."""
    shipped = [f"{SAMPLES}/{f.name}" for f in (resources.files("lvlm.assets") / SAMPLES).iterdir()]
    if answer.image not in shipped:
        return f"is of {shown(answer.image)}, which is no shipped image"
    steps, tokens = answer.steps, answer.tokens
    if not steps or len(steps) != len(tokens):
        return f"has {len(tokens)} tokens and {len(steps)} steps"
    if not all(len(step.ids) == len(step.logits) > 0 for step in steps):
        return "has a step whose ids and logits are not as many, or none"
    if not all(np.isfinite(step.logits).all() for step in steps):
        return "has logits that are not finite"
    if not all(0 <= token < vocab for ids in (tokens, *(s.ids for s in steps)) for token in ids):
        return f"has tokens outside of the vocabulary of {vocab:,}"
    return ""


def limit_of(manifest: Manifest) -> float:
    """Limit on how far logits may be from the record."""
    found = LIMITS[manifest.dtype]
    if manifest.cache_dtype == "int8":
        found = max(found, HELD_IN_8_BITS)
    return found if manifest.quantization is None else max(found, QUANTIZED)


def compare(model: Model, answers: list[RecordedAnswer]) -> list[Comparison]:
    """Each answer beside that of a loaded model. Raises nothing that the model does: that is a
    problem, said."""
    found = []
    for answer in answers:
        comparison = Comparison(answer, limit_of(model.manifest))
        try:
            _follow(model, comparison)
        except LvlmError as error:
            comparison.problem = str(error)
        found.append(comparison)
    return found


def agree(manifest: Manifest, found: list[Comparison]) -> bool:
    """True where a device computes what was recorded.

    Where a recipe ranks tokens or entries another order of the same sum ranks near ties otherwise,
    hardly so in two images: one that agrees is enough.
    """
    chooses = bool(manifest.shortenings) or manifest.cache_policy is not None
    return (any if chooses else all)(comparison.passed for comparison in found)


def _follow(model: Model, found: Comparison) -> None:
    answer = found.answer
    image = (resources.files("lvlm.assets") / answer.image).read_bytes()
    options = GenerationOptions(
        max_new_tokens=len(answer.tokens) + 1, chat_template=answer.chat_template
    )
    prompt = model.prepare(0, answer.text, [image], options)
    if tuple(map(int, prompt.ids)) != answer.ids:
        found.problem = "the prompt's token ids differ: another version of tokenizers or pillow?"
        return
    batch = model.calls.start([prompt])
    if (room := batch.running[0].row.limit) < len(answer.tokens):
        found.problem = f"{len(answer.tokens)} new tokens are recorded, there is room for {room}"
        return
    for number, (token, step) in enumerate(zip(answer.tokens, answer.steps, strict=True)):
        logits, ids = batch.logits[0], np.array(step.ids)
        expected = np.array(step.logits)
        scale = max(float(np.abs(expected).max()), 1e-6)
        apart = float(np.abs(logits[ids] - expected).max()) / scale
        found.apart.append(apart if np.isfinite(apart) else float("inf"))
        own = number > 0 and model.calls.graphs.chooses  # what a greedy answer would have
        chosen = int(batch.best[0] if own else np.argmax(logits))
        # Of a token that is not among the highest no more is known than of the last of these
        theirs = dict(zip(step.ids, step.logits, strict=True)).get(chosen, step.logits[-1])
        found.unlike += step.logits[0] - theirs > found.limit * scale
        if number + 1 < len(answer.tokens):
            batch.feed([token])
