"""Where in the image a token lies: on one whose colours are its coordinates, each place of the
grid has the colours that the pixels of its token have, whatever was cut, padded or moved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.processors import load_processor

SIZES = [(48, 48), (60, 100), (101, 60), (150, 40), (31, 97), (24, 24)]  # height, width
PIXELS = {"resample": 2, "rescale_factor": 1 / 255, "mean": None, "std": None}
LLAVA = PIXELS | {"name": "llava", "pad_value": [0, 0, 0], "image_tokens": 16}
ANYRES = (
    PIXELS
    | {"side": 24, "patches": 4, "max_tokens": None}
    | {"resolutions": [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]}
)
SQUARE = {"height": 24, "width": 24}
CASES: dict[str, dict[str, Any]] = {
    "crop": LLAVA | {"resize": {"shortest_edge": 24}, "crop": SQUARE, "pad_to_square": False},
    "smaller crop": LLAVA
    | {
        "resize": {"shortest_edge": 32},
        "crop": {"height": 24, "width": 20},
        "pad_to_square": False,
    },
    "crop beyond": LLAVA
    | {
        "resize": {"shortest_edge": 24},
        "crop": {"height": 40, "width": 36},
        "pad_to_square": False,
    },
    "stretch": LLAVA | {"resize": SQUARE, "crop": None, "pad_to_square": False},
    "pad": LLAVA | {"resize": {"shortest_edge": 24}, "crop": SQUARE, "pad_to_square": True},
    "crop as it is": LLAVA | {"resize": None, "crop": SQUARE, "pad_to_square": False},
    "llava_next": ANYRES | {"name": "llava_next"},
    "llava_onevision": ANYRES
    | {"name": "llava_onevision", "most_tiles": 2, "pad_value": [0, 0, 0], "video": None},
    "internvl": PIXELS
    | {
        "name": "internvl",
        "size": SQUARE,
        "min_tiles": 1,
        "max_tiles": 6,
        "tile_tokens": 16,
        "image_token": "<i>",
        "start": "",
        "end": "",
    },
    "smolvlm": PIXELS
    | {
        "name": "smolvlm",
        "longest_edge": 72,
        "side": 24,
        "split": True,
        "tile_tokens": 16,
        "image_token": "<i>",
        "around": "",
        "whole": "",
        "video": None,
    },
    "lfm2_vl": PIXELS
    | {
        "name": "lfm2_vl",
        "patch": 3,
        "merge": 2,
        "tile": 24,
        "min_tiles": 2,
        "max_tiles": 4,
        "thumbnail": True,
        "min_tokens": 4,
        "max_tokens": 60,
        "tolerance": 1.5,
        "image_token": "<i>",
        "begin": "",
        "end": "",
        "whole": "",
    },
    "pixtral": PIXELS
    | {
        "name": "pixtral",
        "patch": 3,
        "merge": 2,
        "longest_edge": 90,
        "max_tokens": 100,
        "image_token": "<i>",
        "row_end": "",
        "image_end": "",
    },
    "qwen_vl": PIXELS
    | {
        "name": "qwen_vl",
        "patch": 3,
        "merge": 2,
        "frames": 1,
        "min_pixels": 36,
        "max_pixels": 4000,
        "max_tokens": 400,
        "window": None,
        "table": None,
        "video": None,
    },
}


def coordinates(height: int, width: int) -> np.ndarray:
    """An image uint8 [H,W,3]: across in red, down in green, and blue everywhere."""
    red = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    green = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    image = np.stack([red, green, np.ones((height, width))], -1)
    return np.round(image * 255).astype(np.uint8)


def colours(image: PreparedImage, shared: int, patches: int) -> np.ndarray:
    """The mean colour [V,3] of what each token is made of, of the vision graph's inputs."""
    pixels = image.arrays["pixel_values"]
    if "sides" in image.arrays:  # of a patch the channels of each pixel lie together
        rows = pixels.reshape(-1, pixels.shape[2], pixels.shape[3] // 3, 3).mean((1, 2))
    elif "position_ids" in image.arrays:  # a token's patches lie together
        rows = pixels.reshape(len(pixels), pixels.shape[1], 3, -1).mean((1, 3))
    else:
        tiles, _, height, width = pixels.shape
        down, across = height // patches, width // patches
        cut = pixels.reshape(tiles, 3, patches, down, patches, across).mean((3, 5))
        rows = cut.transpose(0, 2, 3, 1).reshape(-1, 3)
    rows = np.concatenate([np.zeros((shared, 3)), rows]).astype(np.float32)
    return image.features(rows)


@pytest.mark.parametrize("several", [False, True], ids=["", "two"])
@pytest.mark.parametrize("case", CASES)
def test_the_grid_lies_on_the_image(case: str, several: bool) -> None:
    config = CASES[case]
    processor, looked_at = load_processor(config), 0
    for height, width in SIZES:
        images = [coordinates(height, width)] * (1 + several)
        prepared = processor.prepare(images)[-1]
        left, top, right, low = prepared.box
        grid = np.arange(16).reshape(4, 4) if prepared.grid is None else prepared.grid
        found = colours(prepared, int("patches" in config), 4)[grid]
        rows, columns = grid.shape
        across = left + (np.arange(columns) + 0.5) / columns * (right - left)
        down = top + (np.arange(rows) + 0.5) / rows * (low - top)
        half_wide, half_high = (right - left) / columns / 2, (low - top) / rows / 2
        inside = np.outer(
            (down - half_high > -1e-6) & (down + half_high < 1 + 1e-6),
            (across - half_wide > -1e-6) & (across + half_wide < 1 + 1e-6),
        )
        looked_at += inside.sum()
        # Bilinear scaling and whole pixels move it by less than half a patch
        np.testing.assert_allclose(
            found[..., 0][inside], np.broadcast_to(across, grid.shape)[inside], atol=half_wide
        )
        np.testing.assert_allclose(
            found[..., 1][inside],
            np.broadcast_to(down[:, None], grid.shape)[inside],
            atol=half_high,
        )
        if case in ("pad", "crop beyond"):
            outside = (down + half_high < 1e-6)[:, None] | (across + half_wide < 1e-6)[None]
            assert (found[..., 2][outside] < 0.3).all()
    assert looked_at > 20
