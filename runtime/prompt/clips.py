"""The clips of a prompt: which of their frames, whether these have room, where they stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from lvlm.core.errors import CapacityError, ParameterError
from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.media.pictures import Picture
from lvlm.runtime.media.video import Footage, VideoSource, open_clip
from lvlm.runtime.processors import Processor
from lvlm.runtime.processors.parts.frames import MAX_FRAMES, Video
from lvlm.runtime.prompt.text import misplaced


class Clips:
    """What a ``processor`` makes of clips; ``room``: how many pictures a prompt may have, frames
    among them, None: any number."""

    def __init__(self, processor: Processor, images: Images, room: int | None) -> None:
        self.video = cast(Video | None, getattr(processor, "video", None))
        why = getattr(processor, "no_video", None)
        self._why = why or f"pictures of kind {processor.name} have none"
        self._images, self._room = images, room

    def open(self, videos: Sequence[VideoSource], images: int, frames: int | None) -> list[Footage]:
        """The clips of a prompt with so many ``images``: ``frames`` of each, or as many as the
        model's own processor takes. Whether there is room is known before anything is decoded.

        Raises ParameterError, CapacityError, ImageError, BackendError.
        """
        if not videos:
            if frames is not None:
                raise ParameterError("frames are of a video; give one (--video)")
            return []
        video = self.video
        if video is None:
            raise ParameterError(f"this model takes no video ({self._why}); give frames as images")
        if video.alone and len(videos) > 1:
            raise ParameterError(f"{len(videos)} videos, but this model takes one in a prompt")
        clips = [open_clip(source) for source in videos]
        chosen = [video.sampled(clip, frames) for clip in clips]
        self._check(images, [len(indices) for indices in chosen], video.per_picture)
        return [video.footage(clip, indices) for clip, indices in zip(clips, chosen, strict=True)]

    def _check(self, images: int, frames: Sequence[int], each: int) -> None:
        if max(frames) > MAX_FRAMES:
            raise CapacityError(f"{max(frames)} frames of a clip; take fewer (--frames 64, say)")
        pictures = images + sum(math.ceil(count / each) for count in frames)
        if self._room is None or pictures <= self._room:
            return
        fit = (self._room - images) // len(frames) * each
        fewer = f"take fewer (--frames {fit}) or" if fit > 0 else "leave the video out or"
        apart = "" if each == 1 else f" ({each} frames each)"
        raise CapacityError(
            f"the video's {sum(frames)} frames make {pictures - images} pictures{apart}, and there "
            f"are {images} images, but there is room for --max-images {self._room}; {fewer} export "
            "with more"
        )

    def placed(
        self, text: str, pictures: Sequence[Picture], clips: Sequence[Footage], advice: str
    ) -> tuple[str, list[Picture], list[int]]:
        """A prompt with image placeholders for the clips' frames in place of each clip's; all
        pictures in its order; the token that each one's are. Raises PromptError, with ``advice``,
        unless each clip has its placeholder."""
        stills, token_id = list(pictures), self._images.token_id
        if self.video is None:
            return text, stills, [token_id] * len(stills)
        parts = text.split(self.video.token)
        if len(parts) != 1 + len(clips):
            raise misplaced("video", len(parts) - 1, len(clips), advice)
        made, ordered = parts[0], stills[: (taken := parts[0].count(self._images.token))]
        token_ids = [token_id] * len(ordered)
        for clip, part in zip(clips, parts[1:], strict=True):
            made += clip.text + part
            following = stills[taken : taken + part.count(self._images.token)]
            taken += len(following)
            ordered += [*clip.pictures, *following]
            token_ids += [clip.token_id] * len(clip.pictures) + [token_id] * len(following)
        # Those without a place are missed where places are counted
        rest = stills[taken:]
        return made, ordered + rest, token_ids + [token_id] * len(rest)
