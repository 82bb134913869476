"""Features of the frames before those of a video, for choices that compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lvlm.runtime.media.prepared_image import PreparedImage

Encode = Callable[[Sequence[PreparedImage]], list[np.ndarray]]


class FramesBefore:
    """Remembers the frame that was encoded last, so that a video that is encoded a frame at a time
    is encoded once. For one thread at a time."""

    def __init__(self) -> None:
        # By the identity of a frame's arrays, which lie beside so that no other ones get it
        self._last: dict[int, tuple[Mapping[str, np.ndarray], np.ndarray]] = {}

    def of(
        self, images: Sequence[PreparedImage], features: Sequence[np.ndarray], encode: Encode
    ) -> list[np.ndarray | None]:
        """Features [V,D] of the frame before each of the ``images``, where its choice asks for
        them: of these themselves, of the last ones before, or encoded again."""
        if not any(image.asks_before for image in images):
            return [None] * len(images)
        known = self._last | {
            id(image.arrays): (image.arrays, own)
            for image, own in zip(images, features, strict=True)
        }
        found: list[np.ndarray | None] = []
        for image in images:
            before = image.asks_before
            if before is not None and id(before.arrays) not in known:
                (own,) = encode([before])
                known[id(before.arrays)] = before.arrays, own
            found.append(None if before is None else known[id(before.arrays)][1])
        last = id(images[-1].arrays)
        self._last = {last: known[last]}
        return found
