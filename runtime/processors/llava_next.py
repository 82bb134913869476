"""LLaVA-NeXT: tiles, the patches of each line of them followed by a newline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.processors.parts.anyres import KEYS, Tiles, tiles_config
from lvlm.runtime.processors.parts.config_values import CLIP_MEAN, CLIP_STD, check_keys, judging


class LlavaNextProcessor:
    """Images → tiles float32 [1 + tiles,3,side,side]; the vision graph gives the newline, then
    patches x patches rows per tile. ``config`` is what :func:`normalise_config` gives, that of
    ``Tiles``; BundleError for any other."""

    name: ClassVar[str] = "llava_next"

    def __init__(self, config: Mapping[str, object]) -> None:
        check_keys(config, KEYS)
        self.tiles = Tiles(config, lambda lines, columns: lines * (columns + 1))

    def prepare(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[PreparedImage]:
        """See Processor."""
        return [self._prepare(image) for image in images]

    def _prepare(self, image: npt.NDArray[np.uint8]) -> PreparedImage:
        pil_image = self.tiles.prepare(image)
        height, width = pil_image.size[::-1]
        pixels = self.tiles.cut(pil_image)
        kept = self.tiles.kept(height, width)
        lines = np.pad(kept, ((0, 0), (0, 1)))  # row 0 is the newline
        index = np.concatenate([self.tiles.whole(), lines.reshape(-1)])[:, None]
        rows = len(pixels) * self.tiles.patches**2
        arrays, grid = {"pixel_values": pixels}, self.tiles.token_grid(*kept.shape)
        box = self.tiles.box(height, width)
        return PreparedImage(arrays, rows, index, size=(height, width), box=box, grid=grid)


PROCESSOR = LlavaNextProcessor

_DEFAULTS: Mapping[str, object] = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}


def normalise_config(
    preprocessor: Mapping[str, object], side: int, patches: int
) -> dict[str, object]:
    """The config of :class:`LlavaNextProcessor` that does what a Hugging Face config says; see
    ``tiles_config``. Raises ParameterError."""
    kind = "LlavaNextImageProcessor"
    config = {"name": LlavaNextProcessor.name} | tiles_config(
        preprocessor, kind, _DEFAULTS, side, patches
    )
    with judging(kind):
        LlavaNextProcessor(config)
    return config
