"""Images' features by content: the same image is encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from lvlm.runtime.media.prepared_image import PreparedImage


class ImageCache:
    """Features [V,D] of the images used last, up to ``limit`` bytes. For one thread."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.hits = self.misses = 0
        self._features: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def features(
        self,
        encode: Callable[[Sequence[PreparedImage]], list[np.ndarray]],
        images: Sequence[PreparedImage],
        digests: Sequence[bytes],
    ) -> list[np.ndarray]:
        """Features [V,D] of each image, of which ``encode`` is given the unknown ones."""
        found = {d: self._features[d] for d in digests if d in self._features}
        unknown = {d: p for d, p in zip(digests, images, strict=True) if d not in found}
        self.hits += len(digests) - len(unknown)
        self.misses += len(unknown)
        if unknown:
            found |= zip(unknown, encode(list(unknown.values())), strict=True)
        for name in dict.fromkeys(digests):
            self._keep(name, found[name])
        return [found[name] for name in digests]

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
