"""Conversations: messages as every client sends them, read once into what the rest works with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from lvlm.core.discovery import nearest
from lvlm.core.errors import PromptError, shown
from lvlm.runtime.media.images import ImageSource
from lvlm.runtime.media.video import VideoSource
from lvlm.runtime.prompt.tools.tool_calls import ToolCall, all_texts, read_calls

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""One conversation: messages of a role and a content, in order."""

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)
OWN_KEYS: dict[str, tuple[str, ...]] = {  # of a message, besides role and content
    "tool": ("name", "tool_call_id"),
    "assistant": ("tool_calls",),
}


@dataclass(frozen=True)
class TextPart:
    """Text, which is text whatever stands in it."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """The place of an image."""

    image: ImageSource = field(repr=False)


@dataclass(frozen=True)
class VideoPart:
    """The place of a video."""

    video: VideoSource = field(repr=False)


Part = TextPart | ImagePart | VideoPart


@dataclass(frozen=True)
class Message:
    """One message. ``plain``: its content was given as a text, not as a list of parts. ``calls``:
    of tools, by the assistant."""

    role: Role
    parts: tuple[Part, ...]
    plain: bool = False
    extra: Mapping[str, str] = field(default_factory=dict)
    calls: tuple[ToolCall, ...] = ()

    @property
    def texts(self) -> list[str]:
        """All that was typed in it."""
        said = [part.text for part in self.parts if isinstance(part, TextPart)]
        called = [text for call in self.calls for text in all_texts(call.written(str))]
        return [*said, *self.extra.values(), *called]


@dataclass(frozen=True)
class Conversation:
    """Messages in order; what a prompt is made of, as a question's text is."""

    messages: tuple[Message, ...]

    @property
    def images(self) -> list[ImageSource]:
        """Images of all messages, in order."""
        return [part.image for part in self._parts() if isinstance(part, ImagePart)]

    @property
    def videos(self) -> list[VideoSource]:
        """Videos of all messages, in order."""
        return [part.video for part in self._parts() if isinstance(part, VideoPart)]

    @property
    def blank(self) -> bool:
        """True where nothing is said, shown or called."""
        called = any(message.calls for message in self.messages)
        return not called and not any(
            not isinstance(p, TextPart) or p.text.strip() for p in self._parts()
        )

    def has(self, role: Role) -> bool:
        return any(message.role == role for message in self.messages)

    def led_by(self, system: str) -> Conversation:
        """With a message of role system before all others."""
        return Conversation((Message("system", (TextPart(system),), plain=True), *self.messages))

    def _parts(self) -> list[Part]:
        return [part for message in self.messages for part in message.parts]


def is_messages(value: object) -> bool:
    """True where it is meant as one conversation: a list that begins with a message."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def read_messages(value: Sequence[object]) -> Conversation:
    """Messages, each ``{"role": …, "content": …}``.

    Args:
        value: a content is a text, or a list of parts: ``{"type": "text", "text": …}``,
            ``{"type": "image", "image": …}``, ``{"type": "video", "video": …}``, or
            ``{"type": "image_url", "image_url": {"url": "data:…"}}``. An assistant's message may
            have ``tool_calls``, in the form of OpenAI's API, and then no content.

    Raises PromptError, which names the message and the part.
    """
    return Conversation(tuple(_message(one, f"message {n}") for n, one in enumerate(value, 1)))


def _message(given: object, where: str) -> Message:
    if not isinstance(given, Mapping):
        raise PromptError(
            f'{where} is {shown(given)}; give {{"role": "user", "content": …}}, and lists of '
            "messages or texts for several prompts"
        )
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        given_role = f"is {shown(role)}" if "role" in given else "is missing"
        raise PromptError(f"{where}: its role {given_role}; give {', '.join(ROLES)}")
    role = ROLES[ROLES.index(role)]  # of its exact type, see _text
    own = OWN_KEYS.get(role, ())
    _check_keys(given, ("role", "content", *own), where)
    calls = read_calls(given.get("tool_calls") or [], where)
    content = given.get("content")
    if calls and content is None:
        content = ""
    elif "content" not in given:
        raise PromptError(f"{where} has no content; give a text or a list of parts")
    texts = [key for key in own if key in given and key != "tool_calls"]
    extra = {key: _text(given[key], f"{where}: its {key}") for key in texts}
    plain = isinstance(content, str)
    if plain:
        parts: tuple[Part, ...] = (TextPart(_text(content, where)),)
    elif isinstance(content, list | tuple):
        parts = tuple(_part(one, f"{where}, part {n}") for n, one in enumerate(content, 1))
    else:
        raise PromptError(
            f"{where}: its content is {shown(content)}; give a text or a list of parts"
        )
    return Message(role, parts, plain, extra, calls)


def _part(given: object, where: str) -> Part:
    if not isinstance(given, Mapping):
        raise PromptError(f'{where} is {shown(given)}; give {{"type": "text", "text": …}}, say')
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in _KINDS:
        what = f"is {shown(kind)}" if "type" in given else "is missing"
        raise PromptError(f"{where}: its type {what}; give {', '.join(_KINDS)}")
    kind = _KINDS[_KINDS.index(kind)]
    _check_keys(given, ("type", kind), where)
    if given.get(kind) is None:
        raise PromptError(f'{where} has type {kind}, but nothing as its "{kind}"')
    value = given[kind]
    if kind == "text":
        return TextPart(_text(value, where))
    if kind == "video":
        return VideoPart(value)
    return ImagePart(_of_url(value, where) if kind == "image_url" else value)


_KINDS = ("text", "image", "video", "image_url")


def _of_url(value: object, where: str) -> str:
    """OpenAI's form: a URL, or an object with one. Whoever sends it may not name files here."""
    if isinstance(value, Mapping):
        _check_keys(value, ("url", "detail"), f"{where}, image_url")
        value = value.get("url")
    if not isinstance(value, str) or value[:5].lower() != "data:":
        raise PromptError(
            f"{where}: its URL is {shown(value)}; give a data: URL (nothing is downloaded), or a "
            'file as {"type": "image", "image": PATH}'
        )
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise PromptError(f"{where}: its text is {shown(value)}; give text (str)")
    text = str.__str__(value)  # of its exact type: what a subclass does is not asked for
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError(f"{where}: its text is not valid Unicode; pass UTF-8 text") from None
    return text


def _check_keys(given: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise PromptError(f"{where}: {nearest('key', str(key), known)}")
