"""LLaVA-OneVision: one image as tiles, shrunk where they are many; several as one tile each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from lvlm.core.errors import ParameterError
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.processors.parts.anyres import KEYS, Tiles, tiles_config
from lvlm.runtime.processors.parts.config_values import (
    CLIP_MEAN,
    CLIP_STD,
    MAX_OUTPUT_SIDE,
    check_growth,
    check_keys,
    colour,
    integer,
    judging,
    numbers,
    per_channel,
    planes,
    with_defaults,
)
from lvlm.runtime.processors.parts.frames import opened
from lvlm.runtime.processors.parts.llava_onevision_video import LlavaOnevisionVideo

SHRINK = 1.1  # by less than this a side is not worth it


class LlavaOnevisionProcessor:
    """Images → tiles float32 [n,3,side,side]; the vision graph gives the newline, then patches x
    patches rows per tile.

    An image that is alone in its prompt is cut; of several, each is padded to a square of
    ``pad_value`` [3]. ``config`` is what :func:`normalise_config` gives, that of ``Tiles`` and
    these; BundleError for any other.
    """

    name: ClassVar[str] = "llava_onevision"

    def __init__(self, config: Mapping[str, object]) -> None:
        check_keys(config, KEYS | {"most_tiles", "pad_value", "video"})
        patches = integer("patches", config["patches"], 1, MAX_OUTPUT_SIDE)
        self._max_patches = integer("most_tiles", config["most_tiles"], 1, 1_000) * patches**2
        self.tiles = Tiles(config, self._tokens)
        self._pad = colour("pad_value", config["pad_value"])
        self.video, self.no_video = opened(
            config["video"], lambda own: LlavaOnevisionVideo(own, self.tiles.side, self._frame)
        )

    def prepare(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[PreparedImage]:
        """See Processor; ImageError for an image so long and thin that its square would exceed
        100 megapixels."""
        if len(images) == 1:
            return [self._cut(images[0])]
        return [self._square(image) for image in images]

    def _cut(self, image: npt.NDArray[np.uint8]) -> PreparedImage:
        pil_image = self.tiles.prepare(image)
        height, width = pil_image.size[::-1]
        pixels = self.tiles.cut(pil_image)
        rows = len(pixels) * self.tiles.patches**2
        kept = self.tiles.kept(height, width)
        shape = self._shrunk(*kept.shape)
        index, weight = kept[..., None], None
        if shape != kept.shape:
            index, weight = shrink(kept, *shape)
        # Row 0 is the newline, at the end of every line
        index = np.pad(index, ((0, 0), (0, 1), (0, 0))).reshape(-1, index.shape[-1])
        whole = np.zeros((self.tiles.patches**2, index.shape[1]), np.int64)
        whole[:, 0] = self.tiles.whole()
        if weight is not None:
            weight = np.pad(weight, ((0, 0), (0, 1), (0, 0)))
            weight[:, -1, 0] = 1
            weight = weight.reshape(-1, weight.shape[-1])
            alone = np.eye(1, weight.shape[1], dtype=np.float32)
            weight = np.concatenate([np.repeat(alone, len(whole), 0), weight])
        index = np.concatenate([whole, index])
        arrays, grid = {"pixel_values": pixels}, self.tiles.token_grid(*shape)
        return PreparedImage(
            arrays,
            rows,
            index,
            weight,
            size=(height, width),
            box=self.tiles.box(height, width),
            grid=grid,
        )

    def _shrunk(self, lines: int, columns: int) -> tuple[int, int]:
        """So many patches, once there are no more of them than the most tiles have."""
        ratio = math.sqrt(lines * columns / self._max_patches)
        return (int(lines // ratio), int(columns // ratio)) if ratio > SHRINK else (lines, columns)

    def _tokens(self, lines: int, columns: int) -> int:
        lines, columns = self._shrunk(lines, columns)
        return max(1, lines * (columns + 1))  # 1: the newline of an image that is not alone

    def _square(self, image: npt.NDArray[np.uint8]) -> PreparedImage:
        (height, width), side = image.shape[:2], max(image.shape[:2])
        pil_image, left, top = Image.fromarray(image), (side - width) // 2, (side - height) // 2
        check_growth(pil_image, side, side)
        square = Image.new("RGB", (side, side), self._pad)
        square.paste(pil_image, (left, top))
        scaled = square.resize((self.tiles.side, self.tiles.side), self.tiles.resample)
        pixels = planes(self.tiles.table, np.asarray(scaled))[None]
        index = np.append(self.tiles.whole(), 0)[:, None]
        rows = self.tiles.patches**2
        right, low = side - left, side - top
        return PreparedImage(
            {"pixel_values": pixels},
            rows,
            index,
            size=(height, width),
            box=(-left / width, -top / height, right / width, low / height),
            grid=np.arange(rows, dtype=np.int32).reshape(self.tiles.patches, -1),
        )

    def _frame(self, tile: npt.NDArray[np.float32], last: bool) -> PreparedImage:
        """Frame of a video: patches pooled two by two; the newline after the last frame only."""
        patches = self.tiles.patches
        half = math.ceil(patches / 2)
        index, weight = shrink(self.tiles.whole().reshape(patches, patches), half, half)
        index, weight = index.reshape(-1, 4), weight.reshape(-1, 4)
        if last:
            index = np.concatenate([index, np.zeros((1, 4), np.int64)])
            weight = np.concatenate([weight, np.eye(1, 4, dtype=np.float32)])
        return PreparedImage({"pixel_values": tile[None]}, patches**2, index, weight)


PROCESSOR = LlavaOnevisionProcessor


def shrink(
    index: npt.NDArray[np.int64], rows: int, columns: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """[H,W] → [rows,columns,4]: which four each is made of, and how much of each. Bilinear as
    torch's ``interpolate`` computes it."""
    (above, below, down), (left, right, across) = (
        _between(old, new) for old, new in zip(index.shape, (rows, columns), strict=True)
    )
    pairs = [(above, left), (above, right), (below, left), (below, right)]
    lines = [1 - down, 1 - down, down, down]
    places = [1 - across, across, 1 - across, across]
    weights = [np.outer(y, x) for y, x in zip(lines, places, strict=True)]
    return np.stack([index[np.ix_(y, x)] for y, x in pairs], -1), np.stack(weights, -1)


def _between(
    old: int, new: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The two of ``old`` places that each of ``new`` lies between, and how far after the first."""
    scale = np.float32(old) / np.float32(new)
    place = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    place = np.maximum(place, 0)
    before = place.astype(np.int64)
    return before, np.minimum(before + 1, old - 1), place - before.astype(np.float32)


# What the exporter uses

_SIDES = range(384, 2305, 384)
_DEFAULTS: Mapping[str, object] = {
    "size": {"height": 384, "width": 384},
    "crop_size": None,
    "resample": 3,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "image_grid_pinpoints": [[height, width] for height in _SIDES for width in _SIDES],
}


def normalise_config(
    preprocessor: Mapping[str, object],
    side: int,
    patches: int,
    max_tiles: int,
    video: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """The config of :class:`LlavaOnevisionProcessor` that does what a Hugging Face config says; see
    ``tiles_config``; ``video`` is that for videos. Raises ParameterError."""
    kind = "LlavaOnevisionImageProcessor"
    config = tiles_config(preprocessor, kind, _DEFAULTS, side, patches)
    if preprocessor.get("do_resize") is False:
        raise ParameterError(f"{kind} without do_resize is not supported; turn it on in its config")
    mean = per_channel(with_defaults(preprocessor, _DEFAULTS)["image_mean"])
    with judging(kind):
        pad = [int(x * 255) for x in numbers("image_mean", mean, 3, low=0)]
        config |= {
            "name": LlavaOnevisionProcessor.name,
            "most_tiles": max_tiles,
            "pad_value": pad,
            "video": video,
        }
        LlavaOnevisionProcessor(config)
    return config
