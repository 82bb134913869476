"""The images of prompts that are being read: encoded in their order, some or all at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lvlm.runtime.media.prepared_image import PreparedImage

# Features [V,D] of each image; they are named by their digests, where anybody has asked for these.
Encode = Callable[[Sequence[PreparedImage], Sequence[bytes]], list[np.ndarray]]


@dataclass
class Encoding:
    """``features`` [V,D] of the images so far, and the milliseconds that they took."""

    encode: Encode
    images: Sequence[PreparedImage]
    digests: Sequence[bytes]
    features: list[np.ndarray] = field(default_factory=list, init=False)
    ms: float = field(default=0.0, init=False)

    @property
    def left(self) -> int:
        """Images that are still to be encoded."""
        return len(self.images) - len(self.features)

    def go_on(self, count: int | None = None) -> None:
        """Encode so many of those that are left, by itself all."""
        if not self.left:
            return
        began, count = time.perf_counter(), self.left if count is None else count
        some = slice(len(self.features), len(self.features) + count)
        self.features += self.encode(self.images[some], self.digests[some])
        self.ms += (time.perf_counter() - began) * 1e3

    def joined(self) -> np.ndarray | None:
        """Features [V,D] of all images so far in one array; None if there are none."""
        return np.concatenate(self.features) if self.features else None
