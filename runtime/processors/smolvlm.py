"""An image as a grid of tiles and a thumbnail, with words between: the preprocessing of SmolVLM.

Source: transformers' ``SmolVLMImageProcessorPil`` and ``SmolVLMProcessor``. All tiles are full:
what is left of an image is scaled up to the next tile, never padded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from lvlm.core.errors import ParameterError
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.processors.parts.config_values import (
    MAX_OUTPUT_SIDE,
    check_keys,
    integer,
    judging,
    need,
    pixel_options,
    pixel_table,
    planes,
    processor_kind,
    text,
    with_defaults,
)
from lvlm.runtime.processors.parts.frames import opened
from lvlm.runtime.processors.parts.smolvlm_video import SmolVLMVideo
from lvlm.runtime.processors.parts.tiles import cut, scaled, tile_grid


class SmolVLMProcessor:
    """Images → float32 [tiles, 3, side, side], ``tile_tokens`` tokens per tile.

    ``config`` is what :func:`normalise_config` gives: ``longest_edge``, to which an image is
    scaled at first; ``side`` of a tile; ``split``: whether there are more tiles than one;
    ``resample`` Pillow's filter number; ``rescale_factor``, and ``mean`` and ``std`` [3] each, or
    None for no such step; and the tokens ``image_token``, ``around`` (before each tile and after
    the last) and ``whole`` (before the thumbnail); ``video``, that of ``SmolVLMVideo``. Raises
    ``BundleError`` for any other config.
    """

    name: ClassVar[str] = "smolvlm"

    def __init__(self, config: Mapping[str, object]) -> None:
        check_keys(config, _KEYS)
        self._longest = integer("longest_edge", config["longest_edge"], 1, MAX_OUTPUT_SIDE)
        self._side = integer("side", config["side"], 1, MAX_OUTPUT_SIDE)
        fits = math.ceil(self._longest / self._side) <= MAX_TILES_ALONG
        need(fits, "side", self._side, f"at least 1/{MAX_TILES_ALONG} of longest_edge")
        split = config["split"]
        need(isinstance(split, bool), "split", split, "true or false")
        self._split = bool(split)
        self._resample = integer("resample", config["resample"], 0, 5)
        self._table = pixel_table(config["rescale_factor"], config["mean"], config["std"])
        self._tokens = integer("tile_tokens", config["tile_tokens"], 1, 1_000_000)
        self._token = text("image_token", config["image_token"])
        self._around, self._whole = text("around", config["around"]), text("whole", config["whole"])
        self.video, self.no_video = opened(
            config["video"], lambda own: SmolVLMVideo(own, self._side, self._token, self._frame)
        )

    def prepare(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[PreparedImage]:
        """See Processor."""
        return [self._prepare(image) for image in images]

    def _prepare(self, image: npt.NDArray[np.uint8]) -> PreparedImage:
        return self._made(*self.pixel_values(image))

    def _frame(self, tile: npt.NDArray[np.float32]) -> PreparedImage:
        return self._made(tile[None], 0, 0)

    def _made(self, pixels: npt.NDArray[np.float32], rows: int, columns: int) -> PreparedImage:
        tokens = len(pixels) * self._tokens
        return PreparedImage(
            {"pixel_values": pixels},
            rows=tokens,
            index=np.arange(tokens)[:, None],
            text=self._expansion(rows, columns),
            grid=tile_grid(max(1, rows), max(1, columns), self._tokens),
        )

    def _expansion(self, rows: int, columns: int) -> str:
        """Text that stands for an image in the prompt: 0 rows where there is one tile."""
        tile = self._token * self._tokens
        places = [
            "".join(
                f"{self._around}<row_{row + 1}_col_{column + 1}>{tile}" for column in range(columns)
            )
            + "\n"
            for row in range(rows)
        ]
        newline = "\n" if rows else ""
        return f"{''.join(places)}{newline}{self._around}{self._whole}{tile}{self._around}"

    def pixel_values(
        self, image: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], int, int]:
        """An image uint8 [H_i, W_i, 3] → its tiles row by row, then the thumbnail; and rows and
        columns of the former, 0 where there is one tile in all."""
        side = self._side
        pixels = scaled(image, *self.first_size(*image.shape[:2]), self._resample)
        rows = columns = 0
        if self._split:
            height, width = self.full_tiles(*pixels.shape[:2])
            pixels = scaled(pixels, height, width, self._resample)
            if max(height, width) > side:
                rows, columns = height // side, width // side
        elif pixels.shape[:2] != (side, side):
            pixels = scaled(pixels, side, side, self._resample)
        tiles = cut(pixels, max(1, rows), max(1, columns))
        if rows:
            thumbnail = scaled(pixels, side, side, self._resample)
            tiles = np.concatenate([tiles, thumbnail[None]])
        return np.stack([planes(self._table, tile) for tile in tiles]), rows, columns

    def first_size(self, height: int, width: int) -> tuple[int, int]:
        """The longer side as ``longest_edge`` says, the other rounded down to an integer and up to
        an even one; both at most 4096."""
        ratio = width / height
        if width >= height:
            width = self._longest
            height = int(width / ratio)
            height += height % 2
        else:
            height = self._longest
            width = int(height * ratio)
            width += width % 2
        height, width = max(height, 1), max(width, 1)
        ratio = width / height
        if width >= height and width > _MAX_EDGE:
            height, width = int(_MAX_EDGE / ratio), _MAX_EDGE
        elif height > width and height > _MAX_EDGE:
            height, width = _MAX_EDGE, int(_MAX_EDGE * ratio)
        return max(height, 1), max(width, 1)

    def full_tiles(self, height: int, width: int) -> tuple[int, int]:
        """The longer side up to the next full tile, the other in proportion and up, too."""
        ratio = width / height
        if width >= height:
            width = _up(width, self._side)
            height = _up(int(width / ratio), self._side)
        else:
            height = _up(height, self._side)
            width = _up(int(height * ratio), self._side)
        return height, width


PROCESSOR = SmolVLMProcessor

MAX_TILES_ALONG = 16
_MAX_EDGE = 4096  # transformers' MAX_IMAGE_SIZE
_KEYS = {"name", "longest_edge", "side", "split", "resample", "rescale_factor", "mean", "std"} | {
    *("tile_tokens", "image_token", "around", "whole", "video")
}


def _up(length: int, side: int) -> int:
    return math.ceil(length / side) * side


# What the exporter uses

_SMOLVLM: Mapping[str, object] = {
    "do_resize": True,
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "resample": 1,
    "do_image_splitting": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def normalise_config(
    preprocessor: Mapping[str, object],
    tile_tokens: int,
    image_token: str,
    around: str,
    whole: str,
    video: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """The config of :class:`SmolVLMProcessor` that does what a Hugging Face config says.

    ``preprocessor`` is a ``preprocessor_config.json`` of the image processor of SmolVLM or
    Idefics3, ``video`` the config for videos. Raises ``ParameterError`` for another, or for an
    option that is not supported.
    """
    kind = processor_kind(preprocessor, ("SmolVLMImageProcessor",))
    given = with_defaults(preprocessor, _SMOLVLM)
    if given.get("do_center_crop") or not given["do_resize"]:
        option = "do_center_crop" if given.get("do_center_crop") else "do_resize = false"
        raise ParameterError(f"{kind} with {option} is not supported; change it in its config")
    config: dict[str, object] = {
        "name": SmolVLMProcessor.name,
        "longest_edge": _longest_edge(kind, "size", given["size"]),
        "side": _longest_edge(kind, "max_image_size", given["max_image_size"]),
        "split": given["do_image_splitting"],
        **pixel_options(given),
        "tile_tokens": tile_tokens,
        "image_token": image_token,
        "around": around,
        "whole": whole,
        "video": video,
    }
    with judging(kind):
        SmolVLMProcessor(config)
    return config


def _longest_edge(kind: str, key: str, value: object) -> object:
    sides = value if isinstance(value, Mapping) else {}
    sides = {name: side for name, side in sides.items() if side is not None}
    if sides.keys() != {"longest_edge"}:
        raise ParameterError(f"{kind} with {key} = {value} is not supported; give a longest_edge")
    return sides["longest_edge"]


def max_tokens(config: Mapping[str, object]) -> int:
    """The most tokens of one image by such a config: of a square one."""
    longest, side, each = config["longest_edge"], config["side"], config["tile_tokens"]
    assert isinstance(longest, int)
    assert isinstance(side, int)
    assert isinstance(each, int)
    longest = min(longest, _MAX_EDGE)
    along = math.ceil((longest + longest % 2) / side) if config["split"] else 1
    return each * (along * along + (along > 1))


def with_max_tokens(config: Mapping[str, object], tokens: int) -> dict[str, object] | None:
    """The same with images scaled so that each gives at most ``tokens``; None: one tile has
    more."""
    side = config["side"]
    assert isinstance(side, int)
    for along in range(MAX_TILES_ALONG, 0, -1):
        longest = along * side - along * side % 2
        bounded = {**config, "longest_edge": longest}
        if longest and max_tokens(bounded) <= tokens:
            return bounded
    return None
