"""An image as one to a dozen tiles and a thumbnail: the preprocessing of InternVL.

The grid of tiles is the one whose shape is closest to the image's. Source: transformers'
``GotOcr2ImageProcessorPil`` with ``crop_to_patches``, which ``InternVLProcessor`` always asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from lvlm.core.errors import ParameterError
from lvlm.runtime.media.images import MAX_PIXELS
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.processors.parts.config_values import (
    CLIP_MEAN,
    CLIP_STD,
    check_keys,
    height_width,
    integer,
    judging,
    need,
    pixel_options,
    pixel_table,
    planes,
    processor_kind,
    size_of,
    text,
    with_defaults,
)
from lvlm.runtime.processors.parts.tiles import closest_grid, cut, scaled, tile_grid


class InternVLProcessor:
    """Images → float32 [tiles, 3, H, W], ``tile_tokens`` tokens per tile.

    ``config`` is what :func:`normalise_config` gives: ``size`` (height and width) of a tile,
    ``resample`` Pillow's filter number, from ``min_tiles`` to ``max_tiles`` without the thumbnail,
    which an image of one tile has not; ``rescale_factor``, and ``mean`` and ``std`` [3] each, or
    None for no such step; ``image_token``, ``start`` and ``end`` of the text that stands for an
    image. Raises ``BundleError`` for any other config.
    """

    name: ClassVar[str] = "internvl"

    def __init__(self, config: Mapping[str, object]) -> None:
        check_keys(config, _KEYS)
        self._size = height_width("size", config["size"])
        self._resample = integer("resample", config["resample"], 0, 5)
        self._max_tiles = integer("max_tiles", config["max_tiles"], 1, MAX_TILES)
        self._min_tiles = integer("min_tiles", config["min_tiles"], 1, self._max_tiles)
        fits = self._max_tiles * self._size[0] * self._size[1] <= MAX_PIXELS
        need(fits, "max_tiles", self._max_tiles, f"such that all have at most {MAX_PIXELS} pixels")
        self._table = pixel_table(config["rescale_factor"], config["mean"], config["std"])
        self._tokens = integer("tile_tokens", config["tile_tokens"], 1, 1_000_000)
        self._token = text("image_token", config["image_token"])
        self._start, self._end = text("start", config["start"]), text("end", config["end"])

    def prepare(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[PreparedImage]:
        """See Processor."""
        return [self._prepare(image) for image in images]

    def _prepare(self, image: npt.NDArray[np.uint8]) -> PreparedImage:
        pixels = self.pixel_values(image)
        tokens = len(pixels) * self._tokens
        return PreparedImage(
            {"pixel_values": pixels},
            rows=tokens,
            index=np.arange(tokens)[:, None],
            text=self._start + self._token * tokens + self._end,
            grid=tile_grid(*self.grid(*image.shape[:2]), self._tokens),
        )

    def pixel_values(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """An image uint8 [H_i, W_i, 3] → its tiles row by row, then the thumbnail."""
        height, width = self._size
        rows, columns = self.grid(*image.shape[:2])
        tiles = cut(scaled(image, rows * height, columns * width, self._resample), rows, columns)
        if len(tiles) > 1:
            thumbnail = scaled(image, height, width, self._resample)
            tiles = np.concatenate([tiles, thumbnail[None]])
        return np.stack([planes(self._table, tile) for tile in tiles])

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles: the closest ratio, of equal ones the first, or a later and
        larger one unless the image has too few pixels for it."""
        # The order is that of transformers: by tiles, then as columns and rows count up
        known = sorted(
            (
                (columns, rows)
                for columns in range(1, self._max_tiles + 1)
                for rows in range(1, self._max_tiles + 1)
                if self._min_tiles <= columns * rows <= self._max_tiles
            ),
            key=lambda shape: shape[0] * shape[1],
        )
        return closest_grid(height, width, self._size[0] * self._size[1], known)


PROCESSOR = InternVLProcessor

MAX_TILES = 64
_KEYS = {"name", "size", "resample", "min_tiles", "max_tiles", "rescale_factor", "mean", "std"} | {
    *("tile_tokens", "image_token", "start", "end")
}


# What the exporter uses

_GOT_OCR2: Mapping[str, object] = {
    "do_resize": True,
    "size": {"height": 384, "width": 384},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "min_patches": 1,
    "max_patches": 12,
}


def normalise_config(
    preprocessor: Mapping[str, object], tile_tokens: int, image_token: str, start: str, end: str
) -> dict[str, object]:
    """The config of :class:`InternVLProcessor` that does what a Hugging Face config says.

    ``preprocessor`` is a ``preprocessor_config.json`` of the image processor of GOT-OCR2, which
    InternVL uses; ``start`` and ``end`` stand around an image's image tokens. Raises
    ``ParameterError`` for another processor, or for an option that is not supported.
    """
    kind = processor_kind(preprocessor, ("GotOcr2ImageProcessor",))
    given = with_defaults(preprocessor, _GOT_OCR2)
    for option in ("do_center_crop", "do_pad"):
        if given.get(option):
            raise ParameterError(
                f"{kind} with {option} is not supported; turn it off in its config"
            )
    if given["max_patches"] == 1 and not given["do_resize"]:
        raise ParameterError(f"{kind} with neither tiles nor do_resize is not supported")
    config: dict[str, object] = {
        "name": InternVLProcessor.name,
        "size": size_of(given["size"], square=True),
        "min_tiles": given["min_patches"],
        "max_tiles": given["max_patches"],
        **pixel_options(given),
        "tile_tokens": tile_tokens,
        "image_token": image_token,
        "start": start,
        "end": end,
    }
    with judging(kind):
        InternVLProcessor(config)
    return config


def max_tokens(config: Mapping[str, object]) -> int:
    """The most tokens of one image by such a config."""
    max_tiles, each = config["max_tiles"], config["tile_tokens"]
    assert isinstance(max_tiles, int)
    assert isinstance(each, int)
    return each * (max_tiles + (max_tiles > 1))


def with_max_tokens(config: Mapping[str, object], tokens: int) -> dict[str, object] | None:
    """The same with as few tiles as give at most ``tokens``; None: one tile has more."""
    max_tiles, min_tiles = config["max_tiles"], config["min_tiles"]
    assert isinstance(max_tiles, int)
    assert isinstance(min_tiles, int)
    for tiles in range(max_tiles, 0, -1):
        bounded = {**config, "max_tiles": tiles, "min_tiles": min(min_tiles, tiles)}
        if max_tokens(bounded) <= tokens:
            return bounded
    return None
