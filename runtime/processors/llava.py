"""One image, one square of pixels: the preprocessing of CLIP, SigLIP and LLaVA image processors.

The steps and their order are those of transformers' PIL processors (``CLIPImageProcessorPil``,
``SiglipImageProcessorPil``, ``LlavaImageProcessorPil``): pad to a square, resize, crop at the
centre, rescale, normalise. They make the same Pillow calls on the same bytes, so that the results
are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from lvlm.core.errors import BundleError, ParameterError
from lvlm.runtime.media.prepared_image import Box, PreparedImage
from lvlm.runtime.processors.parts.config_values import (
    CLIP_MEAN,
    CLIP_STD,
    MAX_OUTPUT_SIDE,
    check_growth,
    check_keys,
    colour,
    height_width,
    integer,
    judging,
    need,
    numbers,
    per_channel,
    pixel_options,
    pixel_table,
    processor_kind,
    size_of,
    with_defaults,
)


class LlavaProcessor:
    """Images → float32 [n, 3, H, W], with the same H, W and number of tokens for all.

    ``config`` is what :func:`normalise_config` gives: ``resize`` is ``{"shortest_edge": S}``,
    ``{"height": H, "width": W}`` or None; ``resample`` Pillow's filter number; ``crop``
    ``{"height", "width"}`` or None; ``pad_to_square`` and ``pad_value`` [3] (0 to 255);
    ``rescale_factor``, and ``mean`` and ``std`` [3] each, or None for no such step;
    ``image_tokens`` per image. Raises ``BundleError`` for any other config.
    """

    name: ClassVar[str] = "llava"

    def __init__(self, config: Mapping[str, object]) -> None:
        check_keys(config, _KEYS)
        self._resize = _resize(config["resize"])
        self._crop = None if config["crop"] is None else height_width("crop", config["crop"])
        pad = config["pad_to_square"]
        need(isinstance(pad, bool), "pad_to_square", pad, "true or false")
        self._pad = colour("pad_value", config["pad_value"]) if pad else None
        self._resample = integer("resample", config["resample"], 0, 5)
        self._tokens = integer("image_tokens", config["image_tokens"], 1, 1_000_000)
        self._table = pixel_table(config["rescale_factor"], config["mean"], config["std"])
        self._size = self._output_size()

    def prepare(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[PreparedImage]:
        """See Processor; raises what ``pixel_values`` does."""
        index = np.arange(self._tokens)[:, None]
        return [
            PreparedImage(
                {"pixel_values": pixels[None]}, self._tokens, index, box=self.box(*image.shape[:2])
            )
            for pixels, image in zip(self.pixel_values(images), images, strict=True)
        ]

    def pixel_values(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Images uint8 [H_i, W_i, 3] → float32 [n, 3, H, W].

        Raises ``ImageError`` for an image so long and thin that it would exceed 100 megapixels on
        the way.
        """
        out = np.empty((len(images), 3, *self._size), np.float32)
        for planes, image in zip(out, images, strict=True):
            pixels = np.asarray(self.fit(image))
            for channel in range(3):
                planes[channel] = self._table[channel][pixels[:, :, channel]]
        return out

    def fit(self, image: npt.NDArray[np.uint8]) -> Image.Image:
        """An image uint8 [H_i, W_i, 3] padded, resized and cropped as for the vision graph."""
        pil_image = Image.fromarray(image)
        if self._pad is not None and pil_image.width != pil_image.height:
            side = max(pil_image.size)
            check_growth(pil_image, side, side)
            square = Image.new("RGB", (side, side), self._pad)
            square.paste(pil_image, ((side - pil_image.width) // 2, (side - pil_image.height) // 2))
            pil_image = square
        if self._resize is not None:
            height, width = self._resized(pil_image.height, pil_image.width)
            check_growth(pil_image, height, width)
            pil_image = pil_image.resize((width, height), Image.Resampling(self._resample))
        if self._crop is not None:
            height, width = self._crop
            # Rounded down, also below zero; outside the image Pillow gives black as transformers
            top, left = (pil_image.height - height) // 2, (pil_image.width - width) // 2
            pil_image = pil_image.crop((left, top, left + width, top + height))
        return pil_image

    def box(self, height: int, width: int) -> Box:
        """Part of such an image that ``fit`` leaves (PreparedImage.box)."""
        rows, columns = (max(height, width),) * 2 if self._pad is not None else (height, width)
        top, left = (rows - height) // 2, (columns - width) // 2
        high, wide = (rows, columns) if self._resize is None else self._resized(rows, columns)
        tall, broad = self._crop or (high, wide)
        over, before = (high - tall) // 2, (wide - broad) // 2
        across, down = columns / wide, rows / high  # pixels of the image per pixel
        return (
            (before * across - left) / width,
            (over * down - top) / height,
            ((before + broad) * across - left) / width,
            ((over + tall) * down - top) / height,
        )

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self._resize, int):
            return self._resize or (height, width)
        short, long = sorted((height, width))
        longer = int(self._resize * long / short)
        return (longer, self._resize) if width <= height else (self._resize, longer)

    def _output_size(self) -> tuple[int, int]:
        if self._crop is not None:
            return self._crop
        if isinstance(self._resize, tuple):
            return self._resize
        if self._resize is not None and self._pad is not None:
            return self._resize, self._resize
        raise BundleError(
            "the processor config gives images of differing sizes, but the vision graph takes "
            "one; it needs crop, or resize to a height and a width"
        )


PROCESSOR = LlavaProcessor

_KEYS = {"name", "resize", "resample", "crop", "pad_to_square", "pad_value"} | {
    *("rescale_factor", "mean", "std", "image_tokens")
}


def _resize(value: object) -> int | tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, Mapping) and value.keys() == {"shortest_edge"}:
        return integer("shortest_edge", value["shortest_edge"], 1, MAX_OUTPUT_SIDE)
    return height_width("resize", value)


# What the exporter uses

_CLIP: Mapping[str, object] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
_SIGLIP: Mapping[str, object] = {
    **_CLIP,
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "crop_size": None,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_DEFAULTS = {
    "CLIPImageProcessor": _CLIP,
    "SiglipImageProcessor": _SIGLIP,
    "LlavaImageProcessor": _CLIP,
}


def normalise_config(preprocessor: Mapping[str, object], image_tokens: int) -> dict[str, object]:
    """The config of :class:`LlavaProcessor` that does what a Hugging Face config says.

    ``preprocessor`` is a ``preprocessor_config.json``, or
    ``processor_config.json["image_processor"]``, of a CLIP, SigLIP or LLaVA image processor, of any
    age and backend; absent keys and nulls mean the class's default, as they do in transformers.
    ``image_tokens`` is the number of tokens that one image gives in the prompt.

    Raises ``ParameterError`` for another processor, or for an option that is not supported.
    """
    kind = processor_kind(preprocessor, _DEFAULTS)
    given = with_defaults(preprocessor, _DEFAULTS[kind])
    pad = bool(given.get("do_pad"))
    if (pad and kind != "LlavaImageProcessor") or given.get("use_square_size"):
        option = "do_pad" if pad else "use_square_size"
        raise ParameterError(f"{kind} with {option} is not supported; turn it off in its config")
    size = size_of(given["size"], square=bool(given.get("default_to_square")))
    crop = size_of(given["crop_size"], square=True)
    mean = per_channel(given["image_mean"])
    with judging(kind):
        colour = [int(x * 255) for x in numbers("image_mean", mean, 3, low=0)] if pad else [0] * 3
        config: dict[str, object] = {
            "name": LlavaProcessor.name,
            "resize": size if given["do_resize"] else None,
            "crop": crop if given["do_center_crop"] else None,
            "pad_to_square": pad,
            "pad_value": colour,
            **pixel_options(given),
            "image_tokens": image_tokens,
        }
        LlavaProcessor(config)
    return config
