"""One image, one square of pixels, its tokens between two words: the preprocessing of Gemma 3.

Source: transformers' ``Gemma3ImageProcessorPil`` and ``Gemma3Processor``, which leaves pan-and-scan
(crops of long images besides) out unless a call asks for it; so does this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from lvlm.core.errors import ParameterError
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.processors.parts.config_values import (
    check_keys,
    height_width,
    integer,
    judging,
    pixel_options,
    pixel_table,
    planes,
    processor_kind,
    size_of,
    text,
    with_defaults,
)
from lvlm.runtime.processors.parts.tiles import scaled, tile_grid


class Gemma3Processor:
    """Images → float32 [1, 3, H, W], ``image_tokens`` tokens each.

    ``config`` is what :func:`normalise_config` gives: ``size`` (height and width), ``resample``
    Pillow's filter number; ``rescale_factor``, and ``mean`` and ``std`` [3] each, or None for no
    such step; ``image_token``, and ``start`` and ``end`` of the text that stands for an image.
    Raises ``BundleError`` for any other config.
    """

    name: ClassVar[str] = "gemma3"

    def __init__(self, config: Mapping[str, object]) -> None:
        check_keys(config, _KEYS)
        self._size = height_width("size", config["size"])
        self._resample = integer("resample", config["resample"], 0, 5)
        self._table = pixel_table(config["rescale_factor"], config["mean"], config["std"])
        self._tokens = integer("image_tokens", config["image_tokens"], 1, 100_000)
        token = text("image_token", config["image_token"])
        start, end = text("start", config["start"]), text("end", config["end"])
        self._text = f"\n\n{start}{token * self._tokens}{end}\n\n"

    def prepare(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[PreparedImage]:
        """See Processor."""
        return [
            PreparedImage(
                {"pixel_values": self.pixel_values(image)[None]},
                rows=self._tokens,
                index=np.arange(self._tokens)[:, None],
                text=self._text,
                grid=tile_grid(1, 1, self._tokens),
            )
            for image in images
        ]

    def pixel_values(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """An image uint8 [H_i, W_i, 3] → float32 [3, H, W]."""
        return planes(self._table, scaled(image, *self._size, self._resample))


PROCESSOR = Gemma3Processor

_KEYS = {"name", "size", "resample", "rescale_factor", "mean", "std"} | {
    *("image_tokens", "image_token", "start", "end")
}

# What the exporter uses

_GEMMA3: Mapping[str, object] = {
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def normalise_config(
    preprocessor: Mapping[str, object], image_tokens: int, image_token: str, start: str, end: str
) -> dict[str, object]:
    """The config of :class:`Gemma3Processor` that does what a Hugging Face config says.

    ``preprocessor`` is a ``preprocessor_config.json`` of Gemma 3's image processor, of any age and
    backend. Raises ``ParameterError`` for another, or for an option that is not supported.
    """
    kind = processor_kind(preprocessor, ("Gemma3ImageProcessor",))
    given = with_defaults(preprocessor, _GEMMA3)
    if not given["do_resize"]:
        raise ParameterError(f"{kind} with do_resize = false is not supported; set it to true")
    if given.get("do_pan_and_scan"):
        raise ParameterError(
            f"{kind} with do_pan_and_scan is not supported; set it to false in its config: "
            "transformers' own Gemma3Processor leaves it out as well, unless a call asks for it"
        )
    config: dict[str, object] = {
        "name": Gemma3Processor.name,
        "size": size_of(given["size"], square=True),
        **pixel_options(given),
        "image_tokens": image_tokens,
        "image_token": image_token,
        "start": start,
        "end": end,
    }
    with judging(kind):
        Gemma3Processor(config)
    return config
