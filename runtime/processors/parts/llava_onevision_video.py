"""Videos for LLaVA-OneVision: a tile per frame, its patches pooled two by two, one newline.

Source: transformers' ``LlavaOnevisionVideoProcessor`` and ``apply_pooling`` of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lvlm.core.errors import ParameterError
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.media.video import PreparedVideo, Video
from lvlm.runtime.processors.parts.config_values import (
    CLIP_MEAN,
    CLIP_STD,
    check_keys,
    integer,
    need,
    pixel_options,
    pixel_table,
    planes,
    text,
)
from lvlm.runtime.processors.parts.frames import evenly, sampling, video_options
from lvlm.runtime.processors.parts.tiles import scaled_frame


class LlavaOnevisionVideo:
    """See VideoProcessor. ``config`` is what :func:`video_config` gives; ``frame`` makes the
    PreparedImage of a tile [3,side,side], with the newline or without."""

    template: str | None = None
    per_image = 1
    alone = False

    def __init__(
        self,
        config: Mapping[str, Any],
        side: int,
        frame: Callable[[npt.NDArray[np.float32], bool], PreparedImage],
    ) -> None:
        check_keys(config, _KEYS)
        self.token = text("token", config["token"])
        self._image = text("image_token", config["image_token"])
        self._token_id = integer("token_id", config["token_id"], 0, 2**31)
        self._fps, self._count = sampling(config)
        need(isinstance(config["sample"], bool), "sample", config["sample"], "true or false")
        self._sample = bool(config["sample"])
        self._resample = integer("resample", config["resample"], 0, 5)
        self._table = pixel_table(config["rescale_factor"], config["mean"], config["std"])
        self._side, self._frame = side, frame

    def sampled(self, video: Video, frames: int | None) -> list[int]:
        """See VideoProcessor."""
        if frames is not None:
            return evenly(video, None, frames)
        return evenly(video, self._fps, self._count) if self._sample else evenly(video, None, None)

    def prepare(self, video: Video, indices: Sequence[int]) -> PreparedVideo:
        """See VideoProcessor."""
        prepared = []
        for number, frame in enumerate(video.read(indices), 1):
            tile = planes(self._table, scaled_frame(frame, self._side, self._side, self._resample))
            prepared.append(self._frame(tile, number == len(indices)))
        return PreparedVideo(self._image * len(prepared), prepared, self._token_id)


_KEYS = {"token", "token_id", "image_token", "sample", "fps", "num_frames", "resample"} | {
    *("rescale_factor", "mean", "std")
}

# What the exporter uses

_DEFAULTS: Mapping[str, object] = {
    "do_resize": True,
    "do_sample_frames": False,
    "size": {"height": 384, "width": 384},
    "crop_size": None,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}


def video_config(
    given: Mapping[str, Any], token: str, token_id: int, image_token: str, side: int
) -> dict[str, object]:
    """The config of :class:`LlavaOnevisionVideo`; ``given`` is transformers'. ParameterError."""
    options = video_options(given, "LlavaOnevisionVideoProcessor", _DEFAULTS)
    size = {key: value for key, value in dict(options["size"]).items() if value is not None}
    if size != {"height": side, "width": side}:
        raise ParameterError(f"frames of size {size}, but the vision tower takes {side} x {side}")
    return {
        "token": token,
        "token_id": token_id,
        "image_token": image_token,
        "sample": bool(options["do_sample_frames"]),
        "fps": options.get("fps"),
        "num_frames": options.get("num_frames"),
        **pixel_options(options),
    }
