"""Images of any resolution, and the configuration of a model that takes them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

SIDE, PATCHES = 24, 4
# Height and width: from one pixel to very wide, very tall and huge
SIZES = [(1, 1), (1, 2), (3, 1), (5, 5), (24, 24), (23, 25), (48, 24), (24, 49), (48, 48), (64, 48)]
SIZES += [(31, 97), (333, 500), (500, 333), (1, 900), (900, 2), (4, 700), (71, 25), (25, 71)]
SIZES += [(50, 3000), (3000, 50), (2000, 1501)]


def sample_images(seed: int = 0) -> list[Image.Image]:
    """One of each size, and kinds of images that need a conversion."""
    rng = np.random.default_rng(seed)
    plain = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in SIZES]
    rgb = plain[SIZES.index((31, 97))]
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(rng.integers(0, 256, (31, 97), np.uint8)))
    return [*plain, rgba, rgb.convert("L"), rgb.quantize(16)]


def model_config(side: int, patches: int, grid: Any) -> Any:
    vision = SimpleNamespace(image_size=side, patch_size=side // patches)
    return SimpleNamespace(vision_config=vision, image_grid_pinpoints=[list(x) for x in grid])
