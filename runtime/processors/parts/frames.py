"""Parts shared by the processors that take videos: which frames, the config, and words for
numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from lvlm.core.errors import BundleError, CheckpointError, ParameterError
from lvlm.runtime.media.video import PreparedVideo, Video
from lvlm.runtime.processors.parts.config_values import integer, text, with_defaults, wrong

MAX_FRAMES = 999  # of a video in a prompt


class VideoProcessor(Protocol):
    """The part of a processor that takes videos; its attribute ``video``.

    token       stands for a video in a prompt
    template    chat template of prompts with videos, None: the bundle's own
    per_image   how many frames make a PreparedImage
    alone       whether a prompt has one video at most
    """

    token: str
    template: str | None
    per_image: int
    alone: bool

    def sampled(self, video: Video, frames: int | None) -> Sequence[int]:
        """Rising indices of the frames to take: as many as the checkpoint's processor takes, or by
        ``frames`` as it does when asked for so many. Raises ParameterError."""

    def prepare(self, video: Video, indices: Sequence[int]) -> PreparedVideo:
        """The video by these of its frames; ImageError."""


def opened(
    config: object, make: Callable[[Mapping[str, Any]], VideoProcessor]
) -> tuple[VideoProcessor | None, str]:
    """The ``video`` of a processor whose config has this one for it, and why it has none."""
    if config is None:
        return None, ""
    if not isinstance(config, Mapping):
        raise wrong("video", config, "an object")
    if "why_not" in config:
        return None, text("why_not", config["why_not"])
    return make(config), ""


def sampling(config: Mapping[str, object]) -> tuple[float | None, int | None]:
    """Frames per second and frames in all that a config asks for."""
    fps, frames = config["fps"], config["num_frames"]
    usable = isinstance(fps, int | float) and not isinstance(fps, bool) and 0 < fps < math.inf
    if fps is not None and not usable:
        raise BundleError(f"the processor config has fps = {fps!r}; export the bundle again")
    if frames is not None:
        frames = integer("num_frames", frames, 1, 1_000_000)
    return fps, frames  # type: ignore[return-value]


def evenly(video: Video, fps: float | None, frames: int | None) -> list[int]:
    """Indices of so many frames from the first on, or so many a second, or all. Source:
    transformers' ``default_sample_indices_fn``."""
    if frames is None:
        if fps is None:
            return list(range(video.frames))
        frames = max(1, int(video.frames / video.fps * fps))
    check_enough(video, frames)
    return (np.arange(frames) * video.frames // frames).tolist()


def check_enough(video: Video, frames: int) -> None:
    if frames > video.frames:
        raise ParameterError(
            f"{frames} frames are asked for, but the video has {video.frames}; take fewer "
            "(--frames)"
        )


def spoken(number: int) -> str:
    """0 to 999 in English words, as num2words has them."""
    if number >= 100:
        rest = f" and {spoken(number % 100)}" if number % 100 else ""
        return f"{_ONES[number // 100]} hundred{rest}"
    if number < 20:
        return _ONES[number]
    return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")


_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


# What the exporter uses


def attempted(make: Callable[[], dict[str, object]]) -> dict[str, object]:
    """The config that ``make`` gives, or why there is none: images can be had all the same."""
    try:
        return make()
    except (ParameterError, CheckpointError, BundleError) as error:
        return {"why_not": str(error)}


def video_options(
    given: Mapping[str, object], kind: str, defaults: Mapping[str, object]
) -> dict[str, Any]:
    """The config of transformers' video processor ``kind``, its ``defaults`` for absent keys.

    ``given`` may be an image processor's, which older checkpoints have alone. Raises ParameterError
    for another kind, and for an option that is not supported.
    """
    named = given.get("video_processor_type", kind)
    if named != kind:
        raise ParameterError(f"video processor {named!r} is not supported; {kind} is")
    found = with_defaults(given, defaults)
    if not found["do_resize"] or found.get("do_center_crop"):
        option = "do_center_crop" if found.get("do_center_crop") else "do_resize = false"
        raise ParameterError(f"{kind} with {option} is not supported")
    return found
