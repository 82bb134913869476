"""Videos for SmolVLM: a tile per frame, with its time in words.

Source: transformers' ``SmolVLMVideoProcessor`` and ``SmolVLMProcessor``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

from lvlm.core.errors import ParameterError
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.media.video import Frame, PreparedVideo, Video
from lvlm.runtime.processors.parts.config_values import (
    MAX_OUTPUT_SIDE,
    check_keys,
    integer,
    pixel_options,
    pixel_table,
    planes,
    text,
)
from lvlm.runtime.processors.parts.frames import sampling, spoken, video_options
from lvlm.runtime.processors.parts.tiles import scaled_frame

# Of prompts with videos, whatever template the checkpoint has
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}"
    "{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class SmolVLMVideo:
    """See VideoProcessor. ``config`` is what :func:`video_config` gives; ``frame`` makes the
    PreparedImage of a tile [3,side,side], and ``image_token``, whose id is ``token_id``, stands for
    it."""

    template: str | None = TEMPLATE
    per_image = 1
    alone = True  # of several, transformers makes the shorter ones longer by empty frames

    def __init__(
        self,
        config: Mapping[str, Any],
        side: int,
        image_token: str,
        frame: Callable[[npt.NDArray[np.float32]], PreparedImage],
    ) -> None:
        check_keys(config, _KEYS)
        self.token = text("token", config["token"])
        self._token_id = integer("token_id", config["token_id"], 0, 2**31)
        self._fps, self._max_frames = sampling(config)
        self._longest = integer("longest_edge", config["longest_edge"], 1, MAX_OUTPUT_SIDE)
        self._resample = integer("resample", config["resample"], 0, 5)
        self._table = pixel_table(config["rescale_factor"], config["mean"], config["std"])
        self._side, self._image, self._frame = side, image_token, frame

    def sampled(self, video: Video, frames: int | None) -> list[int]:
        """See VideoProcessor. So many a second, at most ``frames``; of a long video without its
        first and last second."""
        max_frames = self._max_frames if frames is None else frames
        fps = video.fps if self._fps is None else self._fps
        if max_frames is None:
            return list(range(video.frames))
        wanted = max(1, min(round(fps * video.seconds), max_frames))
        first, last = 0, video.frames - 1
        if video.seconds - 2 > max_frames * fps:
            first, last = int(video.fps), min(int(video.frames - video.fps), last)
        if first >= last:
            first, last = 0, video.frames - 1
        return [int(i) for i in np.unique(np.linspace(first, last, wanted, dtype=int))]

    def prepare(self, video: Video, indices: Sequence[int]) -> PreparedVideo:
        """See VideoProcessor."""
        prepared = [self._frame(self.pixels(frame)) for frame in video.read(indices)]
        duration = timedelta(seconds=int(video.seconds))
        said = (
            f"You are provided the following series of {spoken(len(indices))} frames from a "
            f"{duration} [H:MM:SS] video.\n"
        )
        for index in indices:
            minute, second = divmod(index / video.fps, 60)
            said += f"\nFrame from {int(minute):02d}:{int(second):02d}:{self._image}"
        return PreparedVideo(said + "\n\n", prepared, self._token_id)

    def pixels(self, frame: Frame) -> npt.NDArray[np.float32]:
        """A frame uint8 [H,W,3] -> its tile float32 [3,side,side]: scaled twice, as theirs."""
        ratio, longest = frame.shape[1] / frame.shape[0], min(self._longest, _MAX_EDGE)
        height = longest if ratio < 1 else int(longest / ratio)
        width = int(longest * ratio) if ratio < 1 else longest
        if ratio < 1:
            width += width % 2
        else:
            height += height % 2
        pixels = scaled_frame(frame, max(height, 1), max(width, 1), self._resample)
        return planes(self._table, scaled_frame(pixels, self._side, self._side, self._resample))


_MAX_EDGE = 4096
_KEYS = {"token", "token_id", "fps", "num_frames", "longest_edge", "resample"} | {
    *("rescale_factor", "mean", "std")
}

# What the exporter uses

_DEFAULTS: Mapping[str, object] = {
    "do_resize": True,
    "size": None,
    "max_image_size": {"longest_edge": 364},
    "resample": 1,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def video_config(given: Mapping[str, Any], token_id: int, side: int) -> dict[str, object]:
    """The config of :class:`SmolVLMVideo`; ``given`` is transformers'. Raises ParameterError."""
    options = video_options(given, "SmolVLMVideoProcessor", _DEFAULTS)
    own = options.get("video_sampling") or {}
    size = options["size"] or own.get("video_size") or {"longest_edge": 4 * 364}
    if options["max_image_size"] != {"longest_edge": side} or set(size) != {"longest_edge"}:
        raise ParameterError(f"frames of size {size} and {options['max_image_size']}")
    return {
        "token": "<video>",
        "token_id": token_id,
        "fps": own.get("fps", options.get("fps")),
        "num_frames": own.get("max_frames", options.get("num_frames")),
        "longest_edge": size["longest_edge"],
        **pixel_options(options),
    }
