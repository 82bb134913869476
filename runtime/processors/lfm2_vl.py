"""Images at their own size, large ones as a grid of tiles and a thumbnail: the preprocessing of
LFM2-VL.

Source: transformers' ``Lfm2VlImageProcessor`` and ``Lfm2VlProcessor``. All that is scaled is scaled
to whole tokens of merge x merge patches; what the vision graph takes of each part is padded to the
tokens that the largest can have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lvlm.core.errors import ImageError, ParameterError
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.processors.parts.config_values import (
    MAX_OUTPUT_SIDE,
    check_keys,
    integer,
    judging,
    need,
    numbers,
    pixel_options,
    pixel_table,
    planes,
    processor_kind,
    text,
    with_defaults,
)
from lvlm.runtime.processors.parts.patches import patch_places, patch_values, whole_tokens
from lvlm.runtime.processors.parts.tiles import closest_grid, cut, scaled_frame, tile_grid

Grid = tuple[int, int]  # rows and columns


class Lfm2VlProcessor:
    """Images -> parts (tiles, then the thumbnail; or the whole), each padded to ``part_tokens``.

    ``config`` is what :func:`normalise_config` gives: ``patch`` and ``merge``; ``tile``, the side
    of a tile; ``min_tiles`` and ``max_tiles``, 1 where images are not split; ``thumbnail``:
    whether there is one beside tiles; ``min_tokens`` and ``max_tokens`` of what is no tile;
    ``tolerance``: how many times the latter an image must have to be split; ``resample`` Pillow's
    filter number; ``rescale_factor``, ``mean`` and ``std`` as for LLaVA; and the tokens
    ``image_token``, ``begin``, ``end`` and ``whole`` (before the thumbnail), all three None where
    parts stand there without words. Raises ``BundleError`` for any other config.
    """

    name: ClassVar[str] = "lfm2_vl"

    def __init__(self, config: Mapping[str, object]) -> None:
        check_keys(config, _KEYS)
        self._patch = integer("patch", config["patch"], 1, 256)
        self._merge = integer("merge", config["merge"], 1, 16)
        self._side = self._patch * self._merge
        self._tile = integer("tile", config["tile"], 1, MAX_OUTPUT_SIDE)
        self._max_tiles = integer("max_tiles", config["max_tiles"], 1, MAX_TILES)
        whole = self._max_tiles == 1 or self._tile % self._side == 0
        need(whole, "tile", self._tile, f"a multiple of {self._side}")
        self._min_tiles = integer("min_tiles", config["min_tiles"], 1, self._max_tiles)
        # An image in one tile would be as large as that, and its words as if it were scaled
        split = self._min_tiles > 1 or self._max_tiles == 1
        need(split, "min_tiles", self._min_tiles, "2 or more")
        thumbnail = config["thumbnail"]
        need(isinstance(thumbnail, bool), "thumbnail", thumbnail, "true or false")
        self._thumbnail = bool(thumbnail)
        self._max_tokens = integer("max_tokens", config["max_tokens"], 1, 65_536)
        self._min_tokens = integer("min_tokens", config["min_tokens"], 1, self._max_tokens)
        [self._tolerance] = numbers("tolerance", [config["tolerance"]], 1, low=0)
        self._resample = integer("resample", config["resample"], 0, 5)
        self._table = pixel_table(*_fused(config["rescale_factor"], config["mean"], config["std"]))
        self._token = text("image_token", config["image_token"])
        marks = [config[name] for name in ("begin", "end", "whole")]
        named = any(mark is not None for mark in marks)
        self._marks = [text("begin, end, whole", mark) for mark in marks] if named else None
        self.part_tokens = part_tokens(config)

    def prepare(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[PreparedImage]:
        """See Processor. Arrays of each, of ``units`` parts of T tokens of p patches: pixel_values
        float32 [units,T,p,patch * patch * 3], position_ids int64 [units,T,p,2] (row and column, -1
        where there is no patch), and sides int64 [units,2], rows and columns of patches in all."""
        return [self._prepare(image) for image in images]

    def _prepare(self, image: npt.NDArray[np.uint8]) -> PreparedImage:
        rows, columns = self.tiles(*image.shape[:2])
        whole = self.grid(*image.shape[:2])
        side, tile = self._side, self._tile // self._side
        parts: list[npt.NDArray[np.uint8]] = []
        if rows * columns > 1:
            size = rows * self._tile, columns * self._tile
            parts += list(cut(scaled_frame(image, *size, self._resample), rows, columns))
        if self._thumbnail or not parts:
            size = whole[0] * side, whole[1] * side
            parts.append(scaled_frame(image, *size, self._resample))
        filled = [self._part(planes(self._table, part)) for part in parts]
        counts = [part.shape[0] * part.shape[1] // side**2 for part in parts]
        index = [n * self.part_tokens + np.arange(count) for n, count in enumerate(counts)]
        grid = tile_grid(rows, columns, tile * tile)
        if rows * columns == 1:
            grid = np.arange(counts[0], dtype=np.int32).reshape(whole)
        return PreparedImage(
            {name: np.stack([part[name] for part in filled]) for name in filled[0]},
            rows=len(parts) * self.part_tokens,
            index=np.concatenate(index)[:, None],
            text=self._expansion((rows, columns), counts),
            grid=grid,
        )

    def _part(self, pixels: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
        """The arrays of one part [3,H,W], of whole tokens."""
        rows, columns = pixels.shape[1] // self._side, pixels.shape[2] // self._side
        values = patch_values([pixels], self._patch, self._merge)
        # The convolution that became a linear layer has its channels last
        tokens, each, _ = values.shape
        shape = tokens, each, 3, self._patch**2
        values = values.reshape(shape).swapaxes(2, 3).reshape(tokens, each, -1)
        missing = ((0, self.part_tokens - tokens), (0, 0), (0, 0))
        places = patch_places(rows, columns, self._merge)
        return {
            "pixel_values": np.pad(values, missing),
            "position_ids": np.pad(places, missing, constant_values=-1),
            "sides": np.array([rows, columns]) * self._merge,
        }

    def _expansion(self, grid: Grid, counts: Sequence[int]) -> str:
        """Text that stands for an image, of so many tokens in each part."""
        parts = [self._token * count for count in counts]
        if self._marks is None:
            return "".join(parts)
        begin, end, whole = self._marks
        if math.prod(grid) > 1:
            places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
            words = [f"<|img_row_{row + 1}_col_{column + 1}|>" for row, column in places] + [whole]
            parts = [word + part for word, part in zip(words, parts, strict=False)]
        return begin + "".join(parts) + end

    def tiles(self, height: int, width: int) -> Grid:
        """Rows and columns of tiles that an image is cut into; 1 and 1: it is not."""
        side = self._side
        tall = max(self._patch, round(height / side) * side)
        wide = max(self._patch, round(width / side) * side)
        if self._max_tiles == 1 or tall * wide <= self._max_tokens * side**2 * self._tolerance:
            return 1, 1
        grids = _grids(self._min_tiles, self._max_tiles)
        return closest_grid(height, width, self._tile**2, grids)

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of tokens of the whole image, or of its thumbnail.

        Raises ``ImageError`` for one so long and thin that it would give too many.
        """
        area = self._side**2
        least, most = self._min_tokens * area, self._max_tokens * area
        rows, columns = whole_tokens(height, width, self._side, least, most, least=1)
        if rows * columns > self.part_tokens:
            ratio = max(height, width) / min(height, width)
            raise ImageError(
                f"an image of {width} x {height} pixels (aspect ratio {ratio:.0f}:1) is too long "
                f"and thin for this model: it would give more than {self.part_tokens} tokens at "
                "once; crop it first"
            )
        return rows, columns


PROCESSOR = Lfm2VlProcessor

MAX_TILES = 64
_KEYS = {"name", "patch", "merge", "tile", "min_tiles", "max_tiles", "thumbnail", "min_tokens"} | {
    *("max_tokens", "tolerance", "resample", "rescale_factor", "mean", "std", "image_token"),
    *("begin", "end", "whole"),
}


def _fused(factor: object, mean: object, std: object) -> Sequence[object]:
    """Scaling and normalisation in one step, as torch's image processors have them."""
    if factor is None or mean is None or std is None:
        return factor, mean, std
    [scale] = numbers("rescale_factor", [factor], 1, low=1e-6)
    wide = [
        [float(np.float32(x) * np.float32(1 / scale)) for x in numbers(name, values, 3, low)]
        for name, values, low in (("mean", mean, -1e6), ("std", std, 1e-6))
    ]
    return [None, *wide]


@cache
def _grids(least: int, most: int) -> list[tuple[int, int]]:
    """Columns and rows of the grids of so many tiles, in transformers' order: that of its set."""
    found = {
        (columns, rows)
        for count in range(least, most + 1)
        for columns in range(1, count + 1)
        for rows in range(1, count + 1)
        if least <= columns * rows <= most
    }
    return sorted(found, key=lambda grid: grid[0] * grid[1])


# What the exporter uses

_DEFAULTS: Mapping[str, object] = {
    "downsample_factor": 2,
    "do_image_splitting": True,
    "min_tiles": 2,
    "max_tiles": 10,
    "use_thumbnail": True,
    "min_image_tokens": 64,
    "max_image_tokens": 256,
    "encoder_patch_size": 16,
    "tile_size": 512,
    "max_pixels_tolerance": 2.0,
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_pad": True,
}


def normalise_config(
    preprocessor: Mapping[str, object],
    image_token: str,
    marks: tuple[str, str, str] | None,
) -> dict[str, object]:
    """The config of :class:`Lfm2VlProcessor` that does what a Hugging Face config says.

    ``preprocessor`` is a ``preprocessor_config.json``, or ``processor_config.json``'s
    ``image_processor``; ``marks`` are the tokens at the beginning and the end of an image, and
    before the thumbnail. Raises ``ParameterError`` for another image processor, or for an option
    that is not supported.
    """
    kind = processor_kind(preprocessor, ("Lfm2VlImageProcessor",))
    given = with_defaults(preprocessor, _DEFAULTS)
    if not given["do_pad"]:
        raise ParameterError(f"{kind} without do_pad is not supported; turn it on in its config")
    tiles = {"min_tiles": given["min_tiles"], "max_tiles": given["max_tiles"]}
    begin, end, whole = marks or (None, None, None)
    config: dict[str, object] = {
        "name": Lfm2VlProcessor.name,
        "patch": given["encoder_patch_size"],
        "merge": given["downsample_factor"],
        "tile": given["tile_size"],
        **(tiles if given["do_image_splitting"] else dict.fromkeys(tiles, 1)),
        "thumbnail": given["use_thumbnail"],
        "min_tokens": given["min_image_tokens"],
        "max_tokens": given["max_image_tokens"],
        "tolerance": given["max_pixels_tolerance"],
        **pixel_options(given),
        "image_token": image_token,
        "begin": begin,
        "end": end,
        "whole": whole,
    }
    with judging(kind):
        Lfm2VlProcessor(config)
    return config


def part_tokens(config: Mapping[str, Any]) -> int:
    """The most tokens of a part: of a tile, or of what is none."""
    return int(max(_tile_tokens(config), config["max_tokens"]))


def max_parts(config: Mapping[str, Any]) -> int:
    """The most parts of one image."""
    tiles: int = config["max_tiles"]
    return tiles + bool(tiles > 1 and config["thumbnail"])


def max_tokens(config: Mapping[str, Any]) -> int:
    """The most tokens of one image by such a config."""
    beside = config["max_tokens"] if config["thumbnail"] else 0
    tiles = config["max_tiles"] * _tile_tokens(config) + beside if config["max_tiles"] > 1 else 0
    return int(max(part_tokens(config), tiles))


def with_max_tokens(config: Mapping[str, Any], tokens: int) -> dict[str, object]:
    """The same with fewer tiles, or none and smaller images, so that each gives at most
    ``tokens``."""
    for most in range(config["max_tiles"], config["min_tiles"] - 1, -1):
        bounded = {**config, "max_tiles": most}
        if most > 1 and max_tokens(bounded) <= tokens:
            return bounded
    most = min(tokens, config["max_tokens"])
    least = min(config["min_tokens"], max(1, most // 4))
    return {**config, "min_tiles": 1, "max_tiles": 1, "max_tokens": most, "min_tokens": least}


def _tile_tokens(config: Mapping[str, Any]) -> int:
    """Tokens of a tile; 0 where there are none."""
    along: int = config["tile"] // (config["patch"] * config["merge"])
    return along * along if config["max_tiles"] > 1 else 0
