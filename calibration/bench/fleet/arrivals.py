"""Requests that come to a fleet: by chance at a rate, or from a file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm.core.errors import BundleError, ParameterError
from lvlm.core.typed_json import decode

MAX_COUNT = 1_000_000  # of anything that is counted


@dataclass(frozen=True)
class Arrival:
    """A request. ``seconds`` from the start; ``text_tokens`` of its prompt, template included;
    ``image`` names what its ``images`` show: the same name, the same images."""

    seconds: float
    text_tokens: int
    new_tokens: int
    images: int = 0
    image: str | None = None


@dataclass(frozen=True)
class Lengths:
    """A range of lengths from ``low`` to ``high``, each as likely."""

    low: int
    high: int

    def draw(self, by: random.Random) -> int:
        return by.randint(self.low, self.high)


@dataclass(frozen=True)
class PoissonArrivals:
    """Poisson arrivals. ``distinct_images`` are equally likely; 0: every request has its own."""

    rate: float
    requests: int
    text_tokens: Lengths
    new_tokens: Lengths
    images: int
    distinct_images: int

    def arrivals(self, seed: int) -> list[Arrival]:
        return list(self._drawn(random.Random(f"fleet {seed}")))

    def _drawn(self, by: random.Random) -> Iterator[Arrival]:
        now = 0.0
        for number in range(self.requests):
            now += by.expovariate(self.rate)
            text, new = self.text_tokens.draw(by), self.new_tokens.draw(by)
            image = by.randrange(self.distinct_images) if self.distinct_images else number
            yield Arrival(now, text, new, self.images, str(image) if self.images else None)


def read_lengths(text: str) -> Lengths:
    """``64``, or ``16-128``. Raises ValueError."""
    low, dash, high = text.partition("-")
    found = Lengths(int(low), int(high) if dash else int(low))
    if not 1 <= found.low <= found.high <= MAX_COUNT:
        raise ValueError
    return found


def read_trace(path: Path) -> list[Arrival]:
    """A JSON object a line, with the fields of Arrival, in the order of ``seconds``.

    Raises ParameterError.
    """
    found: list[Arrival] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ParameterError(f"--trace {path} cannot be read ({error}); give another") from None
    for number, line in enumerate(lines, 1):
        where = f"--trace {path}, line {number}"
        try:
            data: Any = json.loads(line)
            arrival = decode(Arrival, data, "request")
        except (ValueError, RecursionError):
            raise ParameterError(f"{where} is no JSON object; write one a line") from None
        except BundleError as error:
            raise ParameterError(f"{where}: {error}") from None
        counts = (arrival.text_tokens, arrival.new_tokens)
        if not all(1 <= n <= MAX_COUNT for n in counts) or not 0 <= arrival.images <= MAX_COUNT:
            raise ParameterError(
                f"{where}: give from 1 to {MAX_COUNT:,} tokens, and images from 0 on"
            )
        if not math.isfinite(arrival.seconds) or arrival.seconds < 0:
            raise ParameterError(f"{where}: give seconds from 0 on")
        if found and arrival.seconds < found[-1].seconds:
            raise ParameterError(f"{where} comes before the line above it; sort them by seconds")
        found.append(arrival)
    if not found:
        raise ParameterError(f"--trace {path} has no requests")
    return found
