"""Open videos: how long they are, and some of their frames as images.

Files are decoded by PyAV (extra ``video``). The frames are those that transformers'
``read_video_pyav`` gives: in the order of the file, not turned by a phone's rotation.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lvlm.core.errors import ImageError, ParameterError, shown
from lvlm.core.installing import install, require
from lvlm.runtime.media.images import open_image
from lvlm.runtime.media.prepared_image import PreparedImage

Frame: TypeAlias = npt.NDArray[np.uint8]

# FFmpeg's readers of plain containers: it also has some that open other files, or the network
_FORMATS = "mov,matroska,avi,mpegts,mpeg,ogg,flv,asf"
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}


@dataclass(frozen=True)
class Video:
    """A video whose frames are read when they are needed.

    Args:
        frames: how many there are.
        fps: frames a second.
        seconds: how long it is.
        height, width: of a frame, in pixels.
        read: gives the frames at rising indices, one by one, as uint8 [H,W,3], RGB; raises
            ImageError where one cannot be read.
    """

    frames: int
    fps: float
    seconds: float
    height: int
    width: int
    read: Callable[[Sequence[int]], Iterator[Frame]]

    @classmethod
    def of(cls, frames: Sequence[Frame], fps: float) -> Video:
        """Make a video of frames that are there already.

        Args:
            frames: images, all of one size: uint8 arrays [H,W,3], RGB, or else what Model.generate
                takes for an image.
            fps: frames a second, above 0.

        Returns:
            Video of these frames.

        Raises:
            ImageError: there are none, their sizes differ, or one is no image.
            ParameterError: fps is no number above 0.
        """
        if isinstance(frames, str | bytes) or not hasattr(frames, "__iter__"):
            raise ImageError(f"frames is {shown(frames)}; give a list of images [H, W, 3]")
        images = [open_image(frame) for frame in frames]
        if len({image.shape for image in images}) != 1:
            raise ImageError("a video needs frames, all of the same size")
        number = fps.item() if hasattr(fps, "item") else fps
        usable = isinstance(number, Real) and not isinstance(number, bool)
        if not usable or not 0 < (rate := float(number)) < math.inf:  # NaN fails every comparison
            raise ParameterError(
                f"fps is {shown(fps)}; give the video's frames per second, a number above 0"
            )
        height, width = images[0].shape[:2]
        seconds = len(images) / rate
        return cls(len(images), rate, seconds, height, width, lambda at: (images[i] for i in at))


VideoSource: TypeAlias = str | os.PathLike[str] | bytes | Video


@dataclass(frozen=True)
class PreparedVideo:
    """A video as its model takes it.

    ``text`` stands for it in the prompt, with an image placeholder for each of the ``images``,
    whose tokens are ``token_id`` instead of the image token.
    """

    text: str
    images: Sequence[PreparedImage]
    token_id: int


def open_video(source: VideoSource) -> Video:
    """The video of a file or of its bytes; only its header is read as yet.

    Raises ImageError if it is none, BackendError if PyAV is not installed.
    """
    if isinstance(source, Video):
        return source
    if isinstance(source, bytes):
        name = f"the video given as {len(source)} bytes"
    elif isinstance(source, str | os.PathLike):
        name = f"video {os.fspath(source)!r}"
        if not os.path.isfile(source):
            raise ImageError(f"{name} does not exist; check it (URLs are not downloaded)")
    else:
        raise ImageError(
            f"a video cannot be made from {type(source).__name__}; give a path, bytes or a Video"
        )
    av = require("av", install("video"))
    with _opened(av, source, name) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or 0
        # Some containers do not say how many there are
        count = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        height, width = stream.height, stream.width
    if count < 1 or not rate > 0:
        raise ImageError(f"{name} does not say how many frames a second it has; save it as MP4")
    open_image(np.broadcast_to(np.uint8(0), (height, width, 3)))  # of a size that is safe
    seconds = float(count / rate)
    return Video(count, float(rate), seconds, height, width, lambda at: _read(av, source, name, at))


def _read(
    av: Any, source: str | os.PathLike[str] | bytes, name: str, wanted: Sequence[int]
) -> Iterator[Frame]:
    chosen = set(wanted)
    with _opened(av, source, name) as container:
        frames = container.decode(video=0)
        for index in range(max(chosen) + 1):
            try:
                frame = next(frames)
                array = frame.to_ndarray(format="rgb24") if index in chosen else None
            except StopIteration:
                raise ImageError(
                    f"{name} ends after {index} frames, before its header says; save it again"
                ) from None
            except (av.error.FFmpegError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ImageError(f"{name} is damaged ({reason}); save it again") from None
            if array is not None:
                yield open_image(array)


def _opened(av: Any, source: str | os.PathLike[str] | bytes, name: str) -> Any:
    file = io.BytesIO(source) if isinstance(source, bytes) else f"file:{os.path.abspath(source)}"
    try:
        container = av.open(file, options=_OPTIONS)
    except (av.error.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name} is not a video that can be read ({reason}); give MP4") from None
    if not container.streams.video:
        container.close()
        raise ImageError(f"{name} has sound only, no frames")
    return container
