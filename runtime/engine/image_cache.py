"""Images' tokens by content: the same image is encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from lvlm.runtime.media.prepared_image import ImageTokens, PreparedImage


class ImageCache:
    """Tokens of the images used last, up to ``limit`` bytes of features. For one thread."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.hits = self.misses = 0
        self._tokens: OrderedDict[bytes, ImageTokens] = OrderedDict()

    def tokens(
        self,
        encode: Callable[[Sequence[PreparedImage]], list[ImageTokens]],
        images: Sequence[PreparedImage],
        digests: Sequence[bytes],
    ) -> list[ImageTokens]:
        """The tokens of each image, of which ``encode`` is given the unknown ones."""
        found = {d: self._tokens[d] for d in digests if d in self._tokens}
        unknown = {d: p for d, p in zip(digests, images, strict=True) if d not in found}
        self.hits += len(digests) - len(unknown)
        self.misses += len(unknown)
        if unknown:
            found |= zip(unknown, encode(list(unknown.values())), strict=True)
        for name in dict.fromkeys(digests):
            self._keep(name, found[name])
        return [found[name] for name in digests]

    def _keep(self, name: bytes, tokens: ImageTokens) -> None:
        if name in self._tokens:
            self._tokens.move_to_end(name)
            return
        size = tokens.features.nbytes
        if size > self.limit:
            return
        # No view that keeps the others alive
        self._tokens[name] = ImageTokens(tokens.features.copy(), tokens.indices)
        self.bytes += size
        while self.bytes > self.limit:
            self.bytes -= self._tokens.popitem(last=False)[1].features.nbytes
