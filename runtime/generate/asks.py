"""Questions or conversations of a call, one or many, with their images and videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lvlm.core.errors import PromptError, shown
from lvlm.runtime.media.images import ImageSource
from lvlm.runtime.media.video import VideoSource
from lvlm.runtime.prompt.messages import Conversation, Messages, is_messages, read_messages

Images = Sequence[ImageSource]
Videos = Sequence[VideoSource]
Question = str | Messages
"""One prompt: a question's text, or the messages of a conversation."""
Questions = Sequence[Question]


@dataclass(frozen=True)
class Ask:
    """One prompt with what belongs to it."""

    prompt: str | Conversation
    images: Images = ()
    videos: Videos = ()


def read_asks(
    prompt: object,
    images: Sequence[Any] | None = (),
    videos: Sequence[Any] | None = (),
) -> tuple[list[Ask], bool]:
    """The prompts of a call, and whether there was a list of them.

    Args:
        prompt: a text; messages; or a list of texts and lists of messages.
        images: of a text; for a list a list each, none at all: none for any. Those of messages
            stand in them.
        videos: likewise.

    Raises PromptError.
    """
    if isinstance(prompt, str) or is_messages(prompt):
        return [one_ask(prompt, images, videos)], False
    if not isinstance(prompt, list | tuple):
        raise PromptError(
            f"prompt is {shown(prompt)}; give text, messages, or a list of texts or messages"
        )
    image_lists = _each("images", images, len(prompt))
    video_lists = _each("videos", videos, len(prompt))
    each = zip(prompt, image_lists, video_lists, strict=True)
    return [one_ask(*one) for one in each], True


def one_ask(prompt: object, images: Images | None = (), videos: Videos | None = ()) -> Ask:
    """One prompt: a text with its images and videos, or messages, which have theirs in them.

    Raises PromptError.
    """
    if isinstance(prompt, str):
        return Ask(prompt, () if images is None else images, () if videos is None else videos)
    if not isinstance(prompt, list | tuple) or not is_messages(prompt):
        wanted = "give the question as text, or messages"
        if isinstance(prompt, list | tuple) and not prompt:
            wanted = 'give messages, as [{"role": "user", "content": …}]'
        raise PromptError(f"prompt is {shown(prompt)}; {wanted}")
    conversation = read_messages(prompt)
    for name, given in (("images", images), ("videos", videos)):
        if given is not None and not (isinstance(given, list | tuple) and not given):
            raise PromptError(
                f"{name} beside messages have no place among them; give each as a part, "
                f'{{"type": "{name[:-1]}", "{name[:-1]}": …}}, and leave {name} out'
            )
    return Ask(conversation, conversation.images, conversation.videos)


def _each(name: str, lists: object, count: int) -> Sequence[Any]:
    """``count`` lists of images or videos."""
    if lists is None or (isinstance(lists, list | tuple) and not lists):
        return [()] * count
    if not isinstance(lists, list | tuple):
        raise PromptError(f"{name} is {shown(lists)}; for a list of prompts give one list each")
    if len(lists) != count:
        raise PromptError(f"{count} prompts but {len(lists)} lists of {name}; give one list each")
    return lists
