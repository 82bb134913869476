"""The videos of a prompt: which of their frames, whether these have room, where they stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from lvlm.core.errors import CapacityError, ParameterError
from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.media.video import PreparedVideo, VideoSource, open_video
from lvlm.runtime.processors import Processor
from lvlm.runtime.processors.parts.frames import MAX_FRAMES, VideoProcessor
from lvlm.runtime.prompt.text import misplaced


def linked(video: PreparedVideo) -> PreparedVideo:
    """The video, each of whose frames knows the one before."""
    images = list(video.images)
    for number in range(1, len(images)):
        images[number] = replace(images[number], before=images[number - 1])
    return replace(video, images=images)


class PromptVideos:
    """Prepares the videos of a prompt and gives their frames places among its images.

    ``processor`` is the bundle's image processor, whose part for videos does the work; ``room``:
    how many images a prompt may have, frames among them, None: any number.
    """

    def __init__(self, processor: Processor, images: Images, room: int | None) -> None:
        self.processor = cast(VideoProcessor | None, getattr(processor, "video", None))
        why = getattr(processor, "no_video", None)
        self._why = why or f"images of kind {processor.name} have none"
        self._images, self._room = images, room

    def prepare(
        self, videos: Sequence[VideoSource], images: int, frames: int | None
    ) -> list[PreparedVideo]:
        """The videos of a prompt with so many ``images``: ``frames`` of each, or as many as the
        model's own processor takes. Whether there is room is known before anything is decoded.

        Raises ParameterError, CapacityError, ImageError, BackendError.
        """
        if not videos:
            if frames is not None:
                raise ParameterError("frames are of a video; give one (--video)")
            return []
        processor = self.processor
        if processor is None:
            raise ParameterError(f"this model takes no video ({self._why}); give frames as images")
        if processor.alone and len(videos) > 1:
            raise ParameterError(f"{len(videos)} videos, but this model takes one in a prompt")
        opened = [open_video(source) for source in videos]
        chosen = [processor.sampled(video, frames) for video in opened]
        self._check(images, [len(indices) for indices in chosen], processor.per_image)
        return [
            linked(processor.prepare(video, indices))
            for video, indices in zip(opened, chosen, strict=True)
        ]

    def _check(self, images: int, frames: Sequence[int], per_image: int) -> None:
        if max(frames) > MAX_FRAMES:
            raise CapacityError(f"{max(frames)} frames of a video; take fewer (--frames 64, say)")
        wanted = images + sum(math.ceil(count / per_image) for count in frames)
        if self._room is None or wanted <= self._room:
            return
        fit = (self._room - images) // len(frames) * per_image
        fewer = f"take fewer (--frames {fit}) or" if fit > 0 else "leave the video out or"
        each = "" if per_image == 1 else f" ({per_image} frames each)"
        raise CapacityError(
            f"the video's {sum(frames)} frames make {wanted - images} images{each}, and there "
            f"are {images} images, but there is room for --max-images {self._room}; {fewer} export "
            "with more"
        )

    def placed(
        self,
        text: str,
        images: Sequence[PreparedImage],
        videos: Sequence[PreparedVideo],
        advice: str,
    ) -> tuple[str, list[PreparedImage], list[int]]:
        """A prompt with image placeholders for the videos' frames in place of each video's; all
        images in its order; the token that each one's are. Raises PromptError, with ``advice``,
        unless each video has its placeholder."""
        stills, token_id = list(images), self._images.token_id
        if self.processor is None:
            return text, stills, [token_id] * len(stills)
        parts = text.split(self.processor.token)
        if len(parts) != 1 + len(videos):
            raise misplaced("video", len(parts) - 1, len(videos), advice)
        made, ordered = parts[0], stills[: (taken := parts[0].count(self._images.token))]
        token_ids = [token_id] * len(ordered)
        for video, part in zip(videos, parts[1:], strict=True):
            made += video.text + part
            following = stills[taken : taken + part.count(self._images.token)]
            taken += len(following)
            ordered += [*video.images, *following]
            token_ids += [video.token_id] * len(video.images) + [token_id] * len(following)
        # Those without a place are missed where places are counted
        rest = stills[taken:]
        return made, ordered + rest, token_ids + [token_id] * len(rest)
