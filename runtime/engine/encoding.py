"""The images of prompts that are being read: encoded in their order, some or all at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lvlm.runtime.media.prepared_image import ImageTokens, PreparedImage
from lvlm.runtime.prompt.prompts import Prompt
from lvlm.runtime.prompt.shortened import placed

# Each image's tokens; they are named by their digests, where anybody has asked for these.
Encode = Callable[[Sequence[PreparedImage], Sequence[bytes]], list[ImageTokens]]


@dataclass
class Encoding:
    """``tokens`` of the images so far, and the milliseconds that they took. ``first``: the number
    of the first one in its prompt."""

    encode: Encode
    images: Sequence[PreparedImage]
    digests: Sequence[bytes]
    first: int = 1
    tokens: list[ImageTokens] = field(default_factory=list, init=False)
    ms: float = field(default=0.0, init=False)

    @property
    def left(self) -> int:
        """Images that are still to be encoded."""
        return len(self.images) - len(self.tokens)

    def go_on(self, count: int | None = None) -> None:
        """Encode so many of those that are left, by itself all."""
        if not self.left:
            return
        began, count = time.perf_counter(), self.left if count is None else count
        some = slice(len(self.tokens), len(self.tokens) + count)
        self.tokens += self.encode(self.images[some], self.digests[some])
        self.ms += (time.perf_counter() - began) * 1e3

    @property
    def features(self) -> list[np.ndarray]:
        """Features [K,D] of the images so far."""
        return [tokens.features for tokens in self.tokens]

    def joined(self) -> np.ndarray | None:
        """Features [K,D] of all images so far in one array; None if there are none."""
        return np.concatenate(self.features) if self.tokens else None

    def placed(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts, of which these are all images from the first one's ``first`` on, with the
        positions of the tokens that were chosen."""
        found, first = [], self.first
        for prompt, rows in zip(prompts, self.rows(prompts), strict=True):
            found.append(placed(prompt, range(first, first + len(rows)), rows))
            first = 1
        return found

    def rows(self, prompts: Sequence[Prompt]) -> list[list[np.ndarray]]:
        """Numbers of the tokens of each image that were chosen, prompt by prompt."""
        found, rest, first = [], [tokens.indices for tokens in self.tokens], self.first
        for prompt in prompts:
            count = len(prompt.images) - first + 1
            found.append(rest[:count])
            rest, first = rest[count:], 1
        return found
