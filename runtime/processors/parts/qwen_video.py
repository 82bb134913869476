"""Videos for Qwen-VL: some frames in succession make a PreparedImage, whose positions tell the time
(Qwen2-VL, 2.5) or which its time stands before in words (Qwen3-VL).

Source: transformers' ``Qwen2VLVideoProcessor``, ``Qwen3VLVideoProcessor`` and their processors, and
``get_rope_index`` of the models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lvlm.core.errors import ImageError, ParameterError
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.media.video import Frame, PreparedVideo, Video
from lvlm.runtime.processors.parts.config_values import (
    CLIP_MEAN,
    CLIP_STD,
    check_keys,
    integer,
    need,
    pixel_options,
    pixel_table,
    planes,
    size_of,
    text,
)
from lvlm.runtime.processors.parts.frames import check_enough, sampling, video_options
from lvlm.runtime.processors.parts.patches import whole_tokens
from lvlm.runtime.processors.parts.tiles import scaled_frame

MAX_RATIO = 200  # of an image's sides: transformers refuses a longer one, too
_PIXELS = 1_000_000_000


class Patches(Protocol):
    """The part of the image processor that videos need."""

    patch: int
    merge: int
    frames: int
    tokens: int

    def prepare_frames(
        self, pixels: Sequence[npt.NDArray[np.float32]], time: int, span: int | None
    ) -> PreparedImage:
        """Frames [3,H,W] of whole tokens -> a PreparedImage, ``time`` after it begins."""


class QwenVideo:
    """See VideoProcessor. ``config`` is what :func:`video_config` gives."""

    template: str | None = None
    alone = False

    def __init__(self, config: Mapping[str, Any], patches: Patches) -> None:
        check_keys(config, _KEYS)
        self.token = text("token", config["token"])
        self._image = text("image_token", config["image_token"])
        self._token_id = integer("token_id", config["token_id"], 0, 2**31)
        for key in ("sample", "timed"):
            need(isinstance(config[key], bool), key, config[key], "true or false")
        self._sample, self._timed = bool(config["sample"]), bool(config["timed"])
        self._before, self._after = text("before", config["before"]), text("after", config["after"])
        self._fps, self._count = sampling(config)
        self._min_frames = integer("min_frames", config["min_frames"], 1, 1_000_000)
        self._max_frames = integer("max_frames", config["max_frames"], 1, 1_000_000)
        self._max_pixels = integer("max_pixels", config["max_pixels"], 1, _PIXELS)
        self._min_pixels = integer("min_pixels", config["min_pixels"], 1, self._max_pixels)
        cap, second = config["cap"], config["second"]
        self._cap = None if cap is None else integer("cap", cap, 1, 100_000_000)
        self._second = None if second is None else integer("second", second, 1, 100_000)
        self._resample = integer("resample", config["resample"], 0, 5)
        self._table = pixel_table(config["rescale_factor"], config["mean"], config["std"])
        self._patches = patches
        self.per_image = patches.frames

    def sampled(self, video: Video, frames: int | None) -> list[int]:
        """See VideoProcessor."""
        count, fps = (frames, None) if frames is not None else (self._count, self._fps)
        if frames is None and not self._sample:
            return list(range(video.frames))
        if self._timed:
            return self._sampled_timed(video, count, fps)
        each, total = self.per_image, video.frames
        if count is not None:
            count = round(count / each) * each
        elif fps is not None:
            highest = min(self._max_frames, total) // each * each
            wanted = min(max(total / video.fps * fps, self._min_frames), highest, total)
            count = math.floor(wanted / each) * each
        else:
            return list(range(total))
        if count < 1:
            raise ParameterError(
                f"{frames or total} frames are too few, {each} make an image; take more"
            )
        check_enough(video, count)
        step = total / count
        # torch.arange computes in double precision and gives single
        return [int(i) for i in (np.arange(math.ceil(total / step)) * step).astype(np.float32)]

    def _sampled_timed(self, video: Video, count: int | None, fps: float | None) -> list[int]:
        if count is None and fps is not None:
            count = int(video.frames / video.fps * fps)
            count = min(max(count, self._min_frames), self._max_frames, video.frames)
        elif count is None:
            count = min(max(video.frames, self._min_frames), self._max_frames)
        check_enough(video, count)
        return [int(i) for i in np.linspace(0, video.frames - 1, count).round()]

    def prepare(self, video: Video, indices: Sequence[int]) -> PreparedVideo:
        """See VideoProcessor."""
        rows, columns = self.grid(video.height, video.width, len(indices))
        side = self._patches.patch * self._patches.merge
        times = self._times(video, indices)
        prepared: list[PreparedImage] = []
        for group in _grouped(video.read(indices), self.per_image):
            pixels = [
                planes(
                    self._table, scaled_frame(frame, rows * side, columns * side, self._resample)
                )
                for frame in group
            ]
            last = len(prepared) + 1 == len(times)
            # What follows a video begins after its rows and columns, however long it is
            span = None if self._timed or last else 0
            prepared.append(self._patches.prepare_frames(pixels, times[len(prepared)], span))
        if not self._timed:
            return PreparedVideo(self._image * len(prepared), prepared, self._token_id)
        said = [
            f"<{seconds:.1f} seconds>{self._before}{self._image}{self._after}"
            for seconds in self.seconds(video, indices)
        ]
        return PreparedVideo("".join(said), prepared, self._token_id)

    def seconds(self, video: Video, indices: Sequence[int]) -> list[float]:
        """Between the first and the last frame of every image."""
        each = self.per_image
        padded = [*indices, *[indices[-1]] * (-len(indices) % each)]
        at = [index / video.fps for index in padded]
        return [(at[i] + at[i + each - 1]) / 2 for i in range(0, len(at), each)]

    def _times(self, video: Video, indices: Sequence[int]) -> list[int]:
        """The first rotary position of every image, less that of the video."""
        number = np.arange(math.ceil(len(indices) / self.per_image))
        if self._timed:
            return [0] * len(number)
        if self._second is None:
            return list(range(len(number)))
        taken = len(indices) / video.frames * video.fps
        step = np.float32(self._second) * np.float32(self.per_image / taken)
        return [int(i) for i in number.astype(np.float32) * step]

    def grid(self, height: int, width: int, frames: int) -> tuple[int, int]:
        """Rows and columns of tokens of an image. Raises ``ImageError``."""
        side, each = self._patches.patch * self._patches.merge, self.per_image
        min_pixels, max_pixels = self._min_pixels, self._max_pixels
        bar = round(frames / each) * each if self._timed else 1
        if self._timed:
            if frames < each:
                raise ImageError(f"a video needs {each} frames or more with this model")
            if self._cap is not None:
                share = max(min(self._cap * side**2, max_pixels // frames), int(min_pixels * 1.05))
                max_pixels = share * frames
            if height < side or width < side:
                scale = max(side / height, side / width)
                height, width = int(height * scale), int(width * scale)
        elif self._cap is not None:
            total = int(self._cap * side * side * 0.9)
            max_pixels = max(min(max_pixels, total * each // frames), int(min_pixels * 1.05))
        limit = self._patches.tokens * side**2 * bar
        if max_pixels > limit:  # images are smaller than the checkpoint's own, so are frames
            max_pixels, min_pixels = limit, min(min_pixels, max(1, limit // 4))
        count = frames if self._timed else 1
        rows, columns = whole_tokens(height, width, side, min_pixels, max_pixels, count, bar)
        ratio = max(height, width) / min(height, width)
        if ratio > MAX_RATIO or rows * columns > self._patches.tokens:
            raise ImageError(
                f"frames of {width} x {height} pixels (aspect ratio {ratio:.0f}:1) are too long "
                f"and thin for this model ({MAX_RATIO}:1 at most, and {self._patches.tokens} image "
                "tokens); crop the video first"
            )
        return rows, columns


def _grouped(frames: Iterator[Frame], each: int) -> Iterator[list[Frame]]:
    """``each`` at a time, the last one again where some are missing."""
    group: list[Frame] = []
    for frame in frames:
        group.append(frame)
        if len(group) == each:
            yield group
            group = []
    if group:
        yield group + [group[-1]] * (each - len(group))


_KEYS = {"token", "token_id", "image_token", "sample", "timed", "before", "after", "fps"} | {
    *("num_frames", "min_frames", "max_frames", "min_pixels", "max_pixels", "cap", "second"),
    *("resample", "rescale_factor", "mean", "std"),
}

_COMMON: Mapping[str, object] = {
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_frames": 4,
    "max_frames": 768,
}
_PLAIN: Mapping[str, object] = {
    **_COMMON,
    "do_sample_frames": False,
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "patch_size": 14,
    "max_video_tokens": 128_000,
}
_TIMED: Mapping[str, object] = {
    **_COMMON,
    "do_sample_frames": True,
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "patch_size": 16,
    "max_video_tokens": 768,
    "fps": 2,
}


def video_config(
    given: Mapping[str, Any],
    tokens: Mapping[str, object],
    cut: Mapping[str, object],
    second: int | None = None,
) -> dict[str, object]:
    """The config of :class:`QwenVideo`; ``given`` is transformers', of Qwen3-VL's class if
    ``tokens`` has a text ``before`` its frames.

    ``tokens`` has the keys token, token_id and image_token, before and after; ``cut`` is how the
    model's images are (patch, frames, merge), ``second`` how many positions last a second. Raises
    ParameterError.
    """
    timed = bool(tokens["before"])
    kind = "Qwen3VLVideoProcessor" if timed else "Qwen2VLVideoProcessor"
    options = video_options(given, kind, _TIMED if timed else _PLAIN)
    own = tuple(options[key] for key in ("patch_size", "temporal_patch_size", "merge_size"))
    if own != tuple(cut[key] for key in ("patch", "frames", "merge")):
        raise ParameterError(f"{kind} cuts frames as {own}, the model's images are {dict(cut)}")
    size = size_of(options["size"], square=False)
    bounds = dict(size) if isinstance(size, Mapping) else {}
    if not timed:  # the older names of both bounds win, as in transformers
        for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            bounds[new] = options.get(old) or bounds.get(new)
    return {
        **tokens,
        "timed": timed,
        "sample": bool(options["do_sample_frames"]),
        "fps": options.get("fps"),
        "num_frames": options.get("num_frames"),
        "min_frames": options["min_frames"],
        "max_frames": options["max_frames"],
        "min_pixels": bounds.get("shortest_edge"),
        "max_pixels": bounds.get("longest_edge"),
        "cap": options["max_video_tokens"] if options.get("cap_pixels_per_frame") else None,
        "second": second,
        **pixel_options(options),
    }
