"""The workload of every contender: prompts of exact length, images, and when they arrive.

All of it follows from a seed, so that a run can be repeated and every contender meets the same
requests. Each request has a text and images of its own: a cache of earlier prompts helps nobody.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lvlm.core.errors import ParameterError
from lvlm.runtime.prompt.prompts import PromptMaker
from lvlm.runtime.prompt.text import Tokenizer

if TYPE_CHECKING:
    from lvlm.runtime.bundle.manifest import Manifest

WORDS = [
    "house",
    "water",
    "small",
    "river",
    "light",
    "green",
    "paper",
    "stone",
    "apple",
    "table",
    "window",
    "garden",
    "road",
    "number",
    "cloud",
    "bird",
    "winter",
    "music",
    "letter",
    "field",
    "bread",
    "silver",
    "north",
    "evening",
    "ship",
    "corner",
    "glass",
    "story",
    "engine",
    "hand",
    "market",
    "bridge",
]
ANY_SIZE = (448, 448)  # of images for a vision graph that takes them at their own
FILLERS = (" a", " I", " 1", ".", ",", "!", "?", " x", "7", " z")  # one token each, in some


@dataclass(frozen=True)
class Case:
    """One row of work: the shape of its requests, and how they arrive.

    ``concurrency`` clients ask one request after another, or, where ``rate`` is given (requests per
    second), they arrive by themselves for ``duration`` seconds. ``requests`` are asked per round.
    """

    text_tokens: int
    images: int
    new_tokens: int
    requests: int
    concurrency: int
    rate: float | None = None
    duration: float | None = None

    @property
    def is_lone(self) -> bool:
        """A single stream: nothing else runs beside a request."""
        return self.rate is None and self.requests == 1

    @property
    def load(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} requests/s"
        return "single stream" if self.is_lone else f"{self.concurrency} at a time"


@dataclass(frozen=True)
class WorkloadRequest:
    """``images`` are seeds of noise (see ``noise``) of ``size`` rows and columns."""

    prompt: str
    images: tuple[int, ...]
    size: tuple[int, int]
    new_tokens: int

    def open(self) -> list[np.ndarray]:
        """uint8 [H,W,3] each."""
        return [noise(seed, self.size) for seed in self.images]


@dataclass(frozen=True)
class RoundWorkload:
    """The requests of one round and their arrivals in seconds; () where clients wait."""

    requests: tuple[WorkloadRequest, ...]
    arrivals: tuple[float, ...]
    concurrency: int


def noise(seed: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def prompt_maker(folder: Path, manifest: Manifest) -> PromptMaker:
    """The bundle's way from texts and images to token ids and pixels, without its graphs."""
    return PromptMaker(
        Tokenizer(folder / "tokenizer.json", manifest.text.eos_ids),
        manifest.images,
        manifest.text.vocab,
        manifest.chat_template,
        manifest.special_tokens,
        generation=manifest.generation,
    )


def arrivals(rate: float, duration: float, seed: int) -> list[float]:
    """Times of a Poisson process: ``rate`` a second, all before ``duration`` seconds.

    Raises ParameterError if none comes that early.
    """
    draw, now, times = random.Random(f"arrivals {seed}"), 0.0, []
    while (now := now + draw.expovariate(rate)) < duration:
        times.append(now)
    if not times:
        raise ParameterError(
            f"--rate {rate:g} brings no request within {duration:g} s; give a longer --duration"
        )
    return times


def work(case: Case, writer: WorkloadPrompts, seed: int) -> RoundWorkload:
    """The requests of the round with this seed."""
    times = arrivals(case.rate, case.duration, seed) if case.rate and case.duration else []
    # Text seeds decide images, too
    seeds = range(1000 * seed, 1000 * seed + (len(times) or case.requests))
    requests = tuple(
        WorkloadRequest(
            writer.write(case.text_tokens, case.images, s),
            tuple(s * 10 + i for i in range(case.images)),
            writer.size,
            case.new_tokens,
        )
        for s in seeds
    )
    return RoundWorkload(requests, tuple(times), case.concurrency)


class WorkloadPrompts:
    """Questions that make prompts of an exact number of text tokens.

    ``bos`` is the token that a tokenizer adds by itself, unless the template has written it.
    """

    def __init__(self, maker: PromptMaker, bos: str | None) -> None:
        self._maker, self._bos = maker, bos
        height, width = maker.images.size or ANY_SIZE
        self.size = height, width

    def rendered(self, text: str, images: int) -> str:
        """The whole prompt, as the chat template writes it if there is one."""
        if self._maker.template is None:
            return f"{self._maker.images.token}\n" * images + text
        return self._maker.template.render(text, images)

    def count(self, text: str, images: int) -> int:
        """Text tokens of the whole prompt, template included."""
        whole = self.rendered(text, images)
        special = self._maker.template is None or not (self._bos and whole.startswith(self._bos))
        return len(self._maker.tokenizer.encode(whole, add_special_tokens=special)) - images

    def write(self, tokens: int, images: int, seed: int) -> str:
        """Raises ParameterError if the template leaves no room, or the tokenizer no way."""
        draw = random.Random(f"prompt {seed}")
        words: list[str] = []

        def count(number: int) -> int:
            while len(words) < number:
                words.append(draw.choice(WORDS))
            return self.count(" ".join(words[:number]), images)

        shortest = count(1)
        if shortest > tokens:
            raise ParameterError(
                f"--prompt-tokens {tokens}: the chat template and one word take {shortest} "
                "already; give more"
            )
        start = " ".join(words[: _last(lambda n: count(n) <= tokens)])
        for text in self._filled(start, tokens, images):
            if self.count(text, images) == tokens:
                return text
        raise ParameterError(
            f"--prompt-tokens {tokens}: this tokenizer makes no text of exactly that many from "
            "the words used here; give one more or less"
        )

    def _filled(self, text: str, tokens: int, images: int) -> Iterator[str]:
        """``text`` with short pieces added as long as they bring it closer to ``tokens``."""
        yield text
        now = self.count(text, images)
        while now < tokens:
            longer = [(self.count(text + f, images), text + f) for f in FILLERS]
            fitting = [pair for pair in longer if now < pair[0] <= tokens]
            if not fitting:
                return
            now, text = min(fitting)
            yield text


def _last(fits: Callable[[int], bool]) -> int:
    """The largest number from 1 on that fits; a number above one that does not fit does not."""
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = math.floor((low + high) / 2)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
