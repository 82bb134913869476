"""Limits of a choice: how much memory, time to the first token and lost quality a user allows."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lvlm.core.errors import ParameterError

TIMES = {"ms": 1.0, "s": 1000.0, "": 1.0}


@dataclass(frozen=True)
class TuneLimits:
    """None: no limit.

    memory    bytes of weights, caches, workspace and kept images together
    ttft_ms   milliseconds from a request's arrival to its first token, median
    max_loss  part of the full model's quality that may be lost, in [0, 1)
    """

    memory: int | None = None
    ttft_ms: float | None = None
    max_loss: float | None = None


def milliseconds(text: str) -> float:
    """300ms, 1.5s, or a number of milliseconds. Raises ParameterError."""
    match = re.fullmatch(r"([\d.]+)\s*(ms|s|)", text.strip().lower(), re.ASCII)
    number = _number(match[1]) if match else None
    if match is None or number is None or number <= 0:
        raise ParameterError(f"--ttft {text}: write a time as 300ms or 1.5s")
    return number * TIMES[match[2]]


def part(text: str) -> float:
    """1%, or 0.01. Raises ParameterError."""
    plain = text.strip()
    number = _number(plain.removesuffix("%").strip())
    if number is not None and plain.endswith("%"):
        number /= 100
    if number is None or not 0 <= number < 1:
        raise ParameterError(f"--max-loss {text}: write a part as 1% or 0.01, below all of it")
    return number


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
