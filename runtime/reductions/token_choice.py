"""Choice of the tokens of an image that go on, of each run of them in the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvlm.core.rounding import rounded
from lvlm.runtime.reductions import rules


@dataclass(frozen=True)
class TokenChoice:
    """The choice in one image: of ``runs`` of tokens, with text between them, as many ``stay``.

    The numbers are known before the image is encoded; which ones stay, behind it.
    """

    rule: str
    settings: Mapping[str, Any]
    runs: tuple[int, ...]
    stay: tuple[int, ...]

    @property
    def temporal(self) -> bool:
        """True where it asks for the features of the frame before."""
        return rules()[self.rule].temporal

    def reduce(
        self, features: np.ndarray, scores: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Indices [K] of the tokens that stay, rising, and their features float32 [K,D]; of
        ``features`` float32 [V,D] and, where the rule asks for them, ``scores`` [V,S], or the
        features of the frame before."""
        rule, found, start = rules()[self.rule], [], 0
        for run, count in zip(self.runs, self.stay, strict=True):
            some = slice(start, start + run)
            own = features[some]
            if count == run:
                found.append((np.arange(start, start + run), own))
            elif count:
                given = None if scores is None else scores[some]
                rows, made = rule.reduce(own, given, count, **self.settings)
                found.append((start + rows, made))
            start += run
        rows, made = zip(*found, strict=True)
        return np.concatenate(rows), np.concatenate(made)


def shared_out(runs: tuple[int, ...], count: int) -> tuple[int, ...]:
    """``count`` tokens over runs in proportion to their lengths; they add up to it exactly."""
    ends = np.cumsum(runs)
    upto = [rounded(int(end) * count / int(ends[-1])) for end in ends]
    return tuple(b - a for a, b in zip([0, *upto], upto, strict=False))
