"""One image, one square of pixels, and a prompt that begins behind the images: the preprocessing of
PaliGemma.

Source: transformers' ``PaliGemmaProcessor``, whose images are those of ``SiglipImageProcessorPil``
(llava.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.processors.llava import LlavaProcessor
from lvlm.runtime.processors.parts.config_values import check_keys, need, text

if TYPE_CHECKING:
    from PIL import Image


class PaliGemmaProcessor:
    """Images → float32 [n, 3, H, W], with the same H, W and number of tokens for all.

    ``config``: ``pixels`` is that of a LlavaProcessor; ``image_token`` stands for an image in a
    prompt, ``begin`` is the token that begins a text. Raises ``BundleError`` for any other config.
    """

    name: ClassVar[str] = "paligemma"

    def __init__(self, config: Mapping[str, object]) -> None:
        check_keys(config, _KEYS)
        pixels = config["pixels"]
        need(isinstance(pixels, Mapping), "pixels", pixels, "a processor's config")
        assert isinstance(pixels, Mapping)
        self._pixels = LlavaProcessor(pixels)
        self._token = text("image_token", config["image_token"])
        self._begin = text("begin", config["begin"])

    def prepare(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[PreparedImage]:
        """See Processor; raises what LlavaProcessor does."""
        return self._pixels.prepare(images)

    def fit(self, image: npt.NDArray[np.uint8]) -> Image.Image:
        """See SquareProcessor."""
        return self._pixels.fit(image)

    def prompt_text(self, prompt: str, images: int) -> str:
        """See Processor. The text begins behind the last image and ends with a line; images that
        have no place in it stand before it."""
        if self._token not in prompt:
            prompt = self._token * images + prompt
        before, token, after = prompt.rpartition(self._token)
        return f"{before}{token}{self._begin}{after}\n"


PROCESSOR = PaliGemmaProcessor

_KEYS = {"name", "pixels", "image_token", "begin"}
