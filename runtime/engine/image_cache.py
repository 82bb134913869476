"""Pictures' features by content: the same picture is encoded once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np


def digest(pixels: np.ndarray) -> bytes:
    """Names a picture by its pixels as the vision graph gets them."""
    shape = repr((pixels.shape, pixels.dtype.str)).encode()
    return hashlib.sha256(shape + np.ascontiguousarray(pixels).tobytes()).digest()


class ImageCache:
    """Features [V,D] of the pictures used last, up to ``limit`` bytes. For one thread."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.hits = self.misses = 0
        self._features: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def features(
        self,
        digests: Sequence[bytes],
        pixels: np.ndarray,
        encode: Callable[[np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """Features [P,V,D] of pixels [P,3,H,W], of which ``encode`` is given the unknown ones."""
        if not len(digests):
            return encode(pixels)
        found = {d: self._features[d] for d in digests if d in self._features}
        unknown = {d: i for i, d in enumerate(digests) if d not in found}
        self.hits += len(digests) - len(unknown)
        self.misses += len(unknown)
        if unknown:
            fresh = encode(pixels[list(unknown.values())])
            found |= zip(unknown, fresh, strict=True)
        for name in dict.fromkeys(digests):
            self._keep(name, found[name])
        return np.stack([found[name] for name in digests])

    def _keep(self, name: bytes, features: np.ndarray) -> None:
        if name in self._features:
            self._features.move_to_end(name)
            return
        if features.nbytes > self.limit:
            return
        self._features[name] = features.copy()  # not a view that keeps the others alive
        self.bytes += features.nbytes
        while self.bytes > self.limit:
            self.bytes -= self._features.popitem(last=False)[1].nbytes
