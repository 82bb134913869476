"""Images at their own size, a token of text after each row: the preprocessing of Pixtral and
Mistral 3.

An image whose longer side is too long is scaled down, then each side up to whole tokens of merge x
merge patches. The steps are those of transformers' ``PixtralImageProcessorPil`` and
``PixtralProcessor``, with the same Pillow calls.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from lvlm.core.errors import ImageError, ParameterError
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.processors.parts.config_values import (
    CLIP_MEAN,
    CLIP_STD,
    MAX_OUTPUT_SIDE,
    check_keys,
    integer,
    judging,
    pixel_options,
    pixel_table,
    planes,
    processor_kind,
    text,
    with_defaults,
)
from lvlm.runtime.processors.parts.patches import patch_places, patch_values
from lvlm.runtime.processors.parts.tiles import scaled


class PixtralProcessor:
    """Images of any size -> tokens [h, w] of merge x merge patches each.

    ``config`` is what :func:`normalise_config` gives: ``patch`` and ``merge``; ``longest_edge`` of
    an image, before its sides are rounded up; ``max_tokens`` that one may give: more are scaled
    down further; ``resample`` Pillow's filter number; ``rescale_factor``, ``mean`` and ``std`` as
    for LLaVA; and the tokens ``image_token``, ``row_end`` (after each row of them but the last) and
    ``image_end``. Raises ``BundleError`` for any other config.
    """

    name: ClassVar[str] = "pixtral"

    def __init__(self, config: Mapping[str, object]) -> None:
        check_keys(config, _KEYS)
        self._patch = integer("patch", config["patch"], 1, 256)
        self._merge = integer("merge", config["merge"], 1, 16)
        self._side = self._patch * self._merge
        self._longest = integer("longest_edge", config["longest_edge"], 1, MAX_OUTPUT_SIDE)
        self._tokens = integer("max_tokens", config["max_tokens"], 1, 1_000_000)
        self._resample = integer("resample", config["resample"], 0, 5)
        self._table = pixel_table(config["rescale_factor"], config["mean"], config["std"])
        self._token = text("image_token", config["image_token"])
        self._row_end = text("row_end", config["row_end"])
        self._image_end = text("image_end", config["image_end"])

    def prepare(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[PreparedImage]:
        """See Processor. Arrays of each, of h * w tokens (units) of p patches: pixel_values float32
        [h*w, p, 3 * patch * patch] and position_ids int64 [h*w, p, 2] (row and column)."""
        return [self._prepare(image) for image in images]

    def _prepare(self, image: npt.NDArray[np.uint8]) -> PreparedImage:
        rows, columns = self.grid(*image.shape[:2])
        height, width, tokens = rows * self._side, columns * self._side, rows * columns
        pixels = planes(self._table, scaled(image, height, width, self._resample))
        return PreparedImage(
            {
                "pixel_values": patch_values([pixels], self._patch, self._merge),
                "position_ids": patch_places(rows, columns, self._merge),
            },
            rows=tokens,
            index=np.arange(tokens)[:, None],
            text=self._row_end.join([self._token * columns] * rows) + self._image_end,
            grid=np.arange(tokens, dtype=np.int32).reshape(rows, columns),
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens that an image becomes, in proportion to its sides.

        Raises ``ImageError`` for one so long and thin that nothing would be left of it.
        """
        rows, columns = self._grid(height, width, self._longest)
        if rows * columns > self._tokens:
            # As of a checkpoint with the longest edge that leaves few enough of this image
            edges = range(1, self._longest + 1)
            edge = bisect_right(
                edges, self._tokens, key=lambda e: math.prod(self._grid(height, width, e))
            )
            rows, columns = self._grid(height, width, edge)
        if not rows * columns:
            ratio = max(height, width) / min(height, width)
            raise ImageError(
                f"an image of {width} x {height} pixels (aspect ratio {ratio:.0f}:1) is too long "
                "and thin for this model: scaled to its size, less than a pixel is left of the "
                "shorter side; crop it first"
            )
        return rows, columns

    def _grid(self, height: int, width: int, longest: int) -> tuple[int, int]:
        """The same where the longer side may have so many pixels; 0 where a side has none left."""
        ratio = max(height / longest, width / longest)
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        return -(-height // self._side), -(-width // self._side)


PROCESSOR = PixtralProcessor

_KEYS = {"name", "patch", "merge", "longest_edge", "max_tokens", "resample", "rescale_factor"} | {
    *("mean", "std", "image_token", "row_end", "image_end")
}

# What the exporter uses

_DEFAULTS: Mapping[str, object] = {
    "do_resize": True,
    "size": {"longest_edge": 1024},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}


def normalise_config(
    preprocessor: Mapping[str, object],
    patch: int,
    merge: int,
    image_token: str,
    row_end: str,
    image_end: str,
) -> dict[str, object]:
    """The config of :class:`PixtralProcessor` that does what a Hugging Face config says.

    ``preprocessor`` is a ``preprocessor_config.json``, or ``processor_config.json``'s
    ``image_processor``, of any age and backend, whose own ``patch_size`` the processor does not
    look at; the others are the processor's. Raises ``ParameterError`` for another image processor,
    or for an option that is not supported.
    """
    kind = processor_kind(preprocessor, ("PixtralImageProcessor",))
    given = with_defaults(preprocessor, _DEFAULTS)
    if given.get("do_center_crop") or not given["do_resize"]:
        option = "do_center_crop" if given.get("do_center_crop") else "do_resize = false"
        raise ParameterError(f"{kind} with {option} is not supported; change it in its config")
    size = given["size"]
    sides = {k: v for k, v in size.items() if v is not None} if isinstance(size, Mapping) else {}
    if sides.keys() != {"longest_edge"}:
        raise ParameterError(f"{kind} with size = {size} is not supported; give a longest_edge")
    config: dict[str, object] = {
        "name": PixtralProcessor.name,
        "patch": patch,
        "merge": merge,
        "longest_edge": sides["longest_edge"],
        "max_tokens": 1,
        **pixel_options(given),
        "image_token": image_token,
        "row_end": row_end,
        "image_end": image_end,
    }
    with judging(kind):
        PixtralProcessor(config)
        config["max_tokens"] = math.ceil(sides["longest_edge"] / (patch * merge)) ** 2
        PixtralProcessor(config)
    return config


def max_tokens(config: Mapping[str, object]) -> int:
    """The most tokens of one image by such a config."""
    tokens = config["max_tokens"]
    assert isinstance(tokens, int)
    return tokens


def with_max_tokens(config: Mapping[str, object], tokens: int) -> dict[str, object]:
    """The same with images scaled down to at most ``tokens`` each; longer and thinner ones than
    that allows are refused."""
    return {**config, "max_tokens": min(tokens, max_tokens(config))}
