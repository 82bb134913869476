"""Images at their own resolution: the preprocessing of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

An image is scaled to sides that are multiples of an image token's (merge x merge patches) and to a
number of pixels within bounds, then cut into patches, those of a token together. The steps are
those of transformers' ``Qwen2VLImageProcessorPil``, with the same Pillow calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from lvlm.core.errors import ImageError, ParameterError
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.processors.parts.config_values import (
    CLIP_MEAN,
    CLIP_STD,
    check_keys,
    integer,
    judging,
    pixel_options,
    pixel_table,
    planes,
    processor_kind,
    size_of,
    with_defaults,
)
from lvlm.runtime.processors.parts.frames import opened
from lvlm.runtime.processors.parts.patches import patch_places, patch_values, whole_tokens
from lvlm.runtime.processors.parts.qwen_video import MAX_RATIO, QwenVideo


class QwenProcessor:
    """Images of any size -> tokens [h, w] of merge x merge patches each.

    ``config`` is what :func:`normalise_config` gives: ``patch``, ``frames`` (copies of the image
    that a patch spans in time) and ``merge``; ``min_pixels`` and ``max_pixels`` of the scaled
    image, ``max_tokens`` that one may give; ``window``, the side in tokens of the windows that
    attend to themselves, or None; ``table``, the side of the square of learned positions that are
    stretched over an image, or None; ``resample`` Pillow's filter number; ``rescale_factor``,
    ``mean`` and ``std`` as for LLaVA; ``video``, that of ``QwenVideo``. Raises
    ``BundleError`` for any other config.
    """

    name: ClassVar[str] = "qwen_vl"

    def __init__(self, config: Mapping[str, object]) -> None:
        check_keys(config, _KEYS)
        self.patch = integer("patch", config["patch"], 1, 256)
        self.merge = integer("merge", config["merge"], 1, 16)
        self.frames = integer("frames", config["frames"], 1, 16)
        self._max_pixels = integer("max_pixels", config["max_pixels"], 1, _PIXELS)
        self._min_pixels = integer("min_pixels", config["min_pixels"], 1, self._max_pixels)
        self.tokens = integer("max_tokens", config["max_tokens"], 1, 1_000_000)
        window = config["window"]
        self._window = None if window is None else integer("window", window, 1, 64)
        table = config["table"]
        self._side = None if table is None else integer("table", table, 1, 1024)
        self._resample = integer("resample", config["resample"], 0, 5)
        self._table = pixel_table(config["rescale_factor"], config["mean"], config["std"])
        self.video, self.no_video = opened(config["video"], lambda own: QwenVideo(own, self))

    def prepare(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[PreparedImage]:
        """See Processor. Arrays of each, of h * w tokens (units) of p patches: pixel_values float32
        [h*w, p, d], position_ids int64 [h*w, p, 2] (row and column), and those of ``_windows``
        and ``_interpolated``."""
        return [self._prepare(image) for image in images]

    def _prepare(self, image: npt.NDArray[np.uint8]) -> PreparedImage:
        rows, columns = self.grid(*image.shape[:2])
        side = self.patch * self.merge
        scaled = Image.fromarray(image).resize(
            (columns * side, rows * side), Image.Resampling(self._resample)
        )
        return self.prepare_frames([planes(self._table, np.asarray(scaled))], 0, None)

    def prepare_frames(
        self, pixels: Sequence[npt.NDArray[np.float32]], time: int, span: int | None
    ) -> PreparedImage:
        """Frames [3,H,W] of whole tokens, or one that stands for all, -> the PreparedImage,
        ``time`` after where it begins; None: what follows is further on by its longer side."""
        side = self.patch * self.merge
        rows, columns = pixels[0].shape[1] // side, pixels[0].shape[2] // side
        arrays: dict[str, npt.NDArray[Any]] = {
            "pixel_values": patch_values(pixels, self.patch, self.merge, self.frames),
            "position_ids": patch_places(rows, columns, self.merge),
        }
        if self._window is not None:
            arrays |= _windows(rows, columns, self._window)
        if self._side is not None:
            sides = rows * self.merge, columns * self.merge
            arrays |= _interpolated(arrays["position_ids"], sides, self._side)
        tokens = rows * columns
        row, column = np.divmod(np.arange(tokens), columns)
        return PreparedImage(
            arrays,
            tokens,
            np.arange(tokens)[:, None],
            offsets=np.stack([np.full_like(row, time), row, column]),
            span=max(rows, columns) if span is None else span,
            grid=np.arange(tokens, dtype=np.int32).reshape(rows, columns),
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens that an image becomes, in proportion to its sides.

        Raises ``ImageError`` for one so long and thin that it would give too many.
        """
        ratio = max(height, width) / min(height, width)
        side = self.patch * self.merge
        rows, columns = whole_tokens(height, width, side, self._min_pixels, self._max_pixels)
        if ratio > MAX_RATIO or rows * columns > self.tokens:
            raise ImageError(
                f"an image of {width} x {height} pixels (aspect ratio {ratio:.0f}:1) is too long "
                f"and thin for this model ({MAX_RATIO}:1 at most, and {self.tokens} image tokens);"
                " crop it first"
            )
        return rows, columns


PROCESSOR = QwenProcessor

_KEYS = {"name", "patch", "merge", "frames", "min_pixels", "max_pixels", "max_tokens", "window"} | {
    *("table", "resample", "rescale_factor", "mean", "std", "video")
}
_PIXELS = 1_000_000_000


def _windows(rows: int, columns: int, side: int) -> dict[str, npt.NDArray[np.int64]]:
    """window [W, side*side]: the tokens of every window of a grid, -1 where it is short of some;
    place [h*w]: where in the flattened windows every token is."""
    tall, wide = -(-rows // side), -(-columns // side)
    padded = np.full((tall * side, wide * side), -1, np.int64)
    padded[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    window = padded.reshape(tall, side, wide, side).transpose(0, 2, 1, 3).reshape(-1, side * side)
    place = np.empty(rows * columns, np.int64)
    place[window[window >= 0]] = np.flatnonzero(window.ravel() >= 0)
    return {"window": window, "place": place}


def _interpolated(
    places: npt.NDArray[np.int64], sides: tuple[int, int], table: int
) -> dict[str, npt.NDArray[Any]]:
    """learned int64 [..., 4]: of a table x table square laid over the image, corners on corners,
    the four positions around each of the patches at ``places`` [..., 2]; share float32 [..., 4]."""
    taps, weights = [], []
    for axis, side in enumerate(sides):
        at = places[..., axis].astype(np.float32) * np.float32(table - 1)
        at /= np.float32(max(side - 1, 1))
        low, both = np.floor(at), np.arange(2, dtype=np.float32)
        taps.append(np.minimum(low.astype(np.int64)[..., None] + [0, 1], table - 1))
        weights.append(np.maximum(1 - np.abs(at[..., None] - low[..., None] - both), 0))
    learned = taps[0][..., :, None] * table + taps[1][..., None, :]
    share = weights[0][..., :, None] * weights[1][..., None, :]
    shape = (*places.shape[:-1], 4)
    return {"learned": learned.reshape(shape), "share": share.reshape(shape)}


# What the exporter uses

_DEFAULTS: Mapping[str, object] = {
    "do_resize": True,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
_KINDS = ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")


def normalise_config(
    preprocessor: Mapping[str, object],
    window: int | None = None,
    table: int | None = None,
    video: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """The config of :class:`QwenProcessor` that does what a Hugging Face config says.

    ``preprocessor`` is a ``preprocessor_config.json``, or ``processor_config.json``'s
    ``image_processor``, of any age and backend; ``window`` and ``table`` are the model's,
    ``video`` is the config for videos. Raises ``ParameterError`` for another processor, or for an
    option that is not supported.
    """
    kind = processor_kind(preprocessor, _KINDS)
    given = with_defaults(preprocessor, _DEFAULTS)
    if not given["do_resize"]:
        raise ParameterError(f"{kind} without do_resize is not supported; turn it on in its config")
    size = size_of(given["size"], square=False)
    bounds = dict(size) if isinstance(size, Mapping) else {}
    # The older names of both bounds win, as in transformers
    min_pixels = given.get("min_pixels", bounds.get("shortest_edge"))
    max_pixels = given.get("max_pixels", bounds.get("longest_edge"))
    config: dict[str, object] = {
        "name": QwenProcessor.name,
        "patch": given["patch_size"],
        "merge": given["merge_size"],
        "frames": given["temporal_patch_size"],
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "max_tokens": 1,
        "window": window,
        "table": table,
        **pixel_options(given),
        "video": video,
    }
    with judging(kind):
        QwenProcessor(config)
        config["max_tokens"] = _max_tokens(config)
        QwenProcessor(config)
    return config


def bounded_config(config: Mapping[str, object], tokens: int) -> dict[str, object]:
    """The same with images scaled down to at most ``tokens`` each; longer and thinner ones than
    that allows are refused."""
    max_pixels = tokens * _token_pixels(config)
    # Images are scaled up to whole tokens, which must not lead beyond the upper bound
    min_pixels = min(_whole(config["min_pixels"]), max(1, max_pixels // 4))
    found = {
        **config,
        "max_pixels": min(_whole(config["max_pixels"]), max_pixels),
        "min_pixels": min_pixels,
    }
    return {**found, "max_tokens": tokens}


def _max_tokens(config: Mapping[str, object]) -> int:
    """The most tokens of any image, whatever its sides are."""
    area = _token_pixels(config)
    highest, lowest = _whole(config["max_pixels"]) / area, _whole(config["min_pixels"]) / area
    # Scaled down, an image of less than a token's height still is one token high
    found = [math.floor(highest), 1]
    if highest < MAX_RATIO:
        found.append(math.floor(math.sqrt(MAX_RATIO * highest)))
    # Scaled up, both sides are rounded up; a side just above n - 1 tokens becomes n
    narrowest = math.sqrt(lowest / MAX_RATIO)
    for side in range(1, math.ceil(math.sqrt(lowest)) + 1):
        found.append(side * math.ceil(lowest / max(side - 1, narrowest)))
    return max(found)


def _token_pixels(config: Mapping[str, object]) -> int:
    return (_whole(config["patch"]) * _whole(config["merge"])) ** 2


def _whole(value: object) -> int:
    assert isinstance(value, int)
    return value
