"""Input of a call: one prompt or a list of them, each with its images and videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lvlm.core.errors import PromptError, shown
from lvlm.runtime.media.images import ImageSource
from lvlm.runtime.media.video import VideoSource

Images = Sequence[ImageSource]
Videos = Sequence[VideoSource]


@dataclass(frozen=True)
class Ask:
    """One prompt with what belongs to it."""

    prompt: str
    images: Images = ()
    videos: Videos = ()


def one_ask(prompt: object, images: Images | None = (), videos: Videos | None = ()) -> Ask:
    """Raises PromptError if ``prompt`` is no text."""
    if not isinstance(prompt, str):
        raise PromptError(f"prompt is {shown(prompt)}; give the question as text")
    return Ask(prompt, () if images is None else images, () if videos is None else videos)


def many_asks(
    prompts: Sequence[object],
    images: Sequence[Images | None] | None = (),
    videos: Sequence[Videos | None] | None = (),
) -> list[Ask]:
    """Prompts, each with its own list of images and of videos; no lists at all: none for any.

    Raises PromptError.
    """
    if not isinstance(prompts, list | tuple):
        raise PromptError(f"prompt is {shown(prompts)}; give text, or a list of texts")
    image_lists = _each("images", images, len(prompts))
    video_lists = _each("videos", videos, len(prompts))
    return [
        one_ask(prompt, image_list, video_list)
        for prompt, image_list, video_list in zip(prompts, image_lists, video_lists, strict=True)
    ]


def _each(name: str, lists: object, count: int) -> Sequence[Any]:
    """``count`` lists of images or videos."""
    if lists is None or (isinstance(lists, list | tuple) and not lists):
        return [()] * count
    if not isinstance(lists, list | tuple):
        raise PromptError(f"{name} is {shown(lists)}; for a list of prompts give one list each")
    if len(lists) != count:
        raise PromptError(f"{count} prompts but {len(lists)} lists of {name}; give one list each")
    return lists
