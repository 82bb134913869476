"""Images for the tests of processors that cut them into tiles."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Width and height: tiny, square, odd, wide, tall, very wide, very tall, huge.
SIZES = [
    *((1, 1), (1, 2), (3, 1), (2, 2), (23, 25), (28, 28), (29, 28), (28, 29), (64, 48), (48, 64)),
    *((31, 97), (56, 56), (57, 55), (100, 33), (333, 500), (500, 333), (1, 900), (900, 2)),
    *((700, 4), (56, 84), (2500, 1900), (150, 150)),
]


def sample_image(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
