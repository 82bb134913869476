"""Images of any size as tiles of one size: an image is scaled into that of a few resolutions
which shows most of it, and cut; beside these tiles the whole image is scaled to one of its own.

The steps and their order are those of transformers' ``LlavaNextImageProcessorPil`` and
``LlavaOnevisionImageProcessorPil``, and what remains of the tiles' patches (padding and nothing
else is taken away again) that of the models' ``pack_image_features``. Sources: LLaVA-NeXT
(llava-vl.github.io/blog/2024-01-30-llava-next), LLaVA-OneVision (arXiv 2408.03326).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from lvlm.core.errors import ParameterError
from lvlm.runtime.media.prepared_image import Box
from lvlm.runtime.processors import Processor
from lvlm.runtime.processors.parts.config_values import (
    MAX_OUTPUT_SIDE,
    integer,
    pixel_options,
    pixel_table,
    planes,
    processor_kind,
    size_of,
    with_defaults,
    wrong,
)

KEYS = {"name", "side", "patches", "resolutions", "resample", "rescale_factor", "mean", "std"} | {
    "max_tokens"
}
MAX_RESOLUTIONS = 64


class Tiles:
    """The cutting of images into tiles.

    ``config``: ``side`` of a tile in pixels and ``patches`` along it; ``resolutions`` [[H,W]] of
    whole tiles; ``resample`` Pillow's filter number; ``rescale_factor``, and ``mean`` and ``std``
    [3] each, or None for no such step; ``max_tokens`` of an image, None: as many as there are.
    ``tokens(lines, columns)`` is how many so much of the tiles gives. BundleError if a value is out
    of range. ``max_tokens`` and ``max_units`` (tiles) are the most that an image gives,
    ``min_tokens`` the least that max_tokens can be.
    """

    def __init__(self, config: Mapping[str, object], tokens: Callable[[int, int], int]) -> None:
        self.side = integer("side", config["side"], 1, MAX_OUTPUT_SIDE)
        self.patches = integer("patches", config["patches"], 1, self.side)
        self.resolutions = _resolutions(config["resolutions"], self.side)
        self.resample = Image.Resampling(integer("resample", config["resample"], 0, 5))
        self.table = pixel_table(config["rescale_factor"], config["mean"], config["std"])
        limit = config["max_tokens"]
        if limit is not None:
            limit = integer("max_tokens", limit, 1, 1_000_000)
        self.max_tokens = self.min_tokens = area = 0
        # An image scaled to one area never asks for a larger one: those are left out together
        for size in sorted(set(map(math.prod, self.resolutions))):
            shapes = [x for r in self.resolutions if math.prod(r) == size for x in self._shapes(*r)]
            count = self.patches**2 + max(tokens(*shape) for shape in shapes)
            self.min_tokens = self.min_tokens or count
            if limit is not None and count > limit:
                break
            area, self.max_tokens = size, max(self.max_tokens, count)
        self._usable = [size for size in self.resolutions if math.prod(size) <= area]
        self.max_units = 1 + area // self.side**2
        if not self._usable:
            raise wrong("max_tokens", limit, f"{self.min_tokens} or more")

    def prepare(self, image: npt.NDArray[np.uint8]) -> Image.Image:
        """An image uint8 [H,W,3], scaled down if it would give too many tokens."""
        pil_image = Image.fromarray(image)
        if self.resolution(*pil_image.size[::-1]) in self._usable:
            return pil_image
        high, wide = _best(self._usable, *pil_image.size[::-1])
        return pil_image.resize(_fitted(pil_image.size, (wide, high)), self.resample)

    def resolution(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the tiles of an image."""
        return _best(self.resolutions, height, width)

    def cut(self, pil_image: Image.Image) -> npt.NDArray[np.float32]:
        """A prepared image → float32 [1 + tiles,3,side,side], the whole image first."""
        side = self.side
        high, wide = self.resolution(pil_image.height, pil_image.width)
        canvas = Image.new("RGB", (wide, high))
        width, height = _fitted(pil_image.size, (wide, high))
        scaled = pil_image.resize((width, height), self.resample)
        canvas.paste(scaled, ((wide - width) // 2, (high - height) // 2))
        pixels = np.asarray(canvas).reshape(high // side, side, wide // side, side, 3)
        parts = pixels.swapaxes(1, 2).reshape(-1, side, side, 3)
        whole = np.asarray(pil_image.resize((side, side), self.resample))
        return np.stack([planes(self.table, tile) for tile in (whole, *parts)])

    def kept(self, height: int, width: int) -> npt.NDArray[np.int64]:
        """The tiles' patches, put together, without the lines and columns of padding: int64
        [rows,columns], which row of the vision graph's each one is."""
        grid = self._grid(*self.resolution(height, width))
        rows, columns = grid.shape
        if width / height > columns / rows:
            top = (rows - int(round(height * (columns / width), 7))) // 2
            return grid[top : rows - top]
        left = (columns - int(round(width * (rows / height), 7))) // 2
        return grid[:, left : columns - left]

    def _grid(self, high: int, wide: int) -> npt.NDArray[np.int64]:
        """The same of all patches: after the newline and the whole image's tile."""
        patches = self.patches
        tiles = (high // self.side, wide // self.side)
        inside = np.arange(patches * patches).reshape(patches, patches)
        first = (1 + np.arange(tiles[0] * tiles[1])).reshape(tiles) * patches * patches
        grid = 1 + first[:, None, :, None] + inside[None, :, None, :]
        return grid.reshape(tiles[0] * patches, tiles[1] * patches)

    def whole(self) -> npt.NDArray[np.int64]:
        """The rows of the tile of the whole image."""
        return 1 + np.arange(self.patches * self.patches)

    def box(self, height: int, width: int) -> Box:
        """Part of a prepared image that ``kept`` leaves (PreparedImage.box): more than all of it
        where patches are padding in part."""
        size = self.resolution(height, width)
        shown = _fitted((width, height), size[::-1])[::-1]
        edges = []
        for whole, own, count in zip(size, shown, self.kept(height, width).shape, strict=True):
            covered = count * self.side / self.patches
            first = (whole - covered) / 2 - (whole - own) // 2
            edges.append((first / own, (first + covered) / own))
        (top, low), (left, right) = edges
        return left, top, right, low

    def token_grid(self, lines: int, columns: int) -> npt.NDArray[np.int32]:
        """Number of the token that each of the tiles' patches is (PreparedImage.grid): behind the
        whole image's, a newline after every line."""
        grid = np.arange(lines * (columns + 1), dtype=np.int32).reshape(lines, columns + 1)
        return self.patches**2 + grid[:, :-1]

    def _shapes(self, high: int, wide: int) -> Iterator[tuple[int, int]]:
        """Lines and columns of every part that can be kept of a resolution (and of some that no
        image leaves)."""
        lines, columns = (x // self.side * self.patches for x in (high, wide))
        for less in range(0, lines + 1, 2):
            yield lines - less, columns
        for less in range(0, columns + 1, 2):
            yield lines, columns - less


class TiledProcessor(Processor, Protocol):
    """A processor that cuts images into these."""

    tiles: Tiles


def _best(resolutions: Sequence[tuple[int, int]], height: int, width: int) -> tuple[int, int]:
    """Height and width that show most of an image; of several, with the least room left."""
    best, max_shown, min_wasted = resolutions[0], -1, 0
    for high, wide in resolutions:
        scale = min(wide / width, high / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        wasted = wide * high - shown
        if shown > max_shown or (shown == max_shown and wasted < min_wasted):
            best, max_shown, min_wasted = (high, wide), shown, wasted
    return best


def _fitted(size: tuple[int, int], room: tuple[int, int]) -> tuple[int, int]:
    """Width and height of an image scaled into ``room``."""
    (width, height), (wide, high) = size, room
    across, down = wide / width, high / height
    if across < down:
        return wide, min(math.ceil(height * across), high)
    return min(math.ceil(width * down), wide), high


def _resolutions(value: object, side: int) -> tuple[tuple[int, int], ...]:
    wanted = f"1 to {MAX_RESOLUTIONS} pairs of a height and a width, multiples of {side}"
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise wrong("resolutions", value, wanted)
    found = []
    for pair in value:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise wrong("resolutions", value, wanted)
        high, wide = (integer("resolutions", x, 1, MAX_OUTPUT_SIDE) for x in pair)
        if high % side or wide % side:
            raise wrong("resolutions", value, wanted)
        found.append((high, wide))
    if not 1 <= len(found) <= MAX_RESOLUTIONS:
        raise wrong("resolutions", value, wanted)
    return tuple(found)


# What the exporter uses


def tiles_config(
    preprocessor: Mapping[str, object],
    kind: str,
    defaults: Mapping[str, object],
    side: int,
    patches: int,
) -> dict[str, object]:
    """The config of :class:`Tiles`, without a name, that does what a Hugging Face config says.

    ``preprocessor`` is that of the image processor class ``kind``, of any age and backend, whose
    ``defaults`` hold for absent keys and nulls; ``side`` and ``patches`` are the vision tower's.
    Raises ParameterError for another class, and for a tile that is not the tower's.
    """
    processor_kind(preprocessor, (kind,))
    given = with_defaults(preprocessor, defaults)
    square = {"height": side, "width": side}
    size = size_of(given["size"], square=bool(given.get("default_to_square")))
    crop = size_of(given["crop_size"], square=True) if given["crop_size"] else None
    if size not in (square, {"shortest_edge": side}) or crop not in (None, square):
        raise ParameterError(
            f"{kind} of the checkpoint makes tiles of {size} (crop_size {crop}), but the vision "
            f"tower takes {side} x {side}; the folder mixes files of two models"
        )
    return {
        "side": side,
        "patches": patches,
        "resolutions": given["image_grid_pinpoints"],
        **pixel_options(given),
        "max_tokens": None,
    }
