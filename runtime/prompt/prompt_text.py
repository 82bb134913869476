"""Text and token ids of a prompt: a question or a conversation, through the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from lvlm.core.errors import ParameterError, PromptError
from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.options.tool_kinds import read_tools
from lvlm.runtime.processors.parts.frames import VideoProcessor
from lvlm.runtime.prompt.chat_template import ChatTemplate
from lvlm.runtime.prompt.literal_text import Literals
from lvlm.runtime.prompt.messages import Conversation
from lvlm.runtime.prompt.text import Tokenizer


@dataclass(frozen=True)
class PromptText:
    """``text`` with a placeholder for every image and video; ``begun``: the token that begins a
    text is in it. ``lead`` is the space before the answer that is no part of it (ChatTemplate).
    ``literals`` are those of messages, whose text is hidden in it; None: special tokens count
    wherever they stand."""

    text: str
    begun: bool = False
    lead: str = ""
    literals: Literals | None = None


class PromptWriter:
    """Writes prompts as a model wants them. Any thread may use it.

    ``template`` is the bundle's chat template, ``video_template`` that of prompts with videos;
    ``special_tokens`` the variables of both. Raises BundleError if one is not valid.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        images: Images,
        chat_template: str | None,
        special_tokens: Mapping[str, str],
        video: VideoProcessor | None,
    ) -> None:
        self._tokenizer, self._image_token = tokenizer, images.token
        self._special_tokens = dict(special_tokens)
        self._bos = special_tokens.get("bos_token")
        self.template = self.video_template = self._opened(chat_template)
        self._video_token = None if video is None else video.token
        if video is not None and video.template:
            self.video_template = self._opened(video.template)
        own = tokenizer.visible_token(images.token_id)
        placeholders = [token for token in (images.token, own, self._video_token) if token]
        self._encode_literal = tokenizer.literal_encoder(placeholders)
        self._given = lru_cache(8)(self._own_template)

    def write(
        self, prompt: str | Conversation, images: int, videos: int, options: GenerationOptions
    ) -> PromptText:
        """The text of a prompt with so many images and videos.

        Raises PromptError, ParameterError, BundleError.
        """
        if isinstance(prompt, Conversation):
            return self._conversation(prompt, videos, options)
        if options.chat_template:
            template = self._template(options.chat_template, videos)
            tools = read_tools(options.tools)
            text = template.render(prompt, images, options.system, videos, self._video_token, tools)
            return PromptText(text, self.begins(text), template.lead)
        for name in ("system", "tools"):
            if getattr(options, name) is not None:
                raise ParameterError(f"{name} needs the chat template; write it into the prompt")
        lead = "" if self.template is None else self.template.lead_after(prompt)
        return PromptText(prompt, lead=lead)

    def _conversation(
        self, conversation: Conversation, videos: int, options: GenerationOptions
    ) -> PromptText:
        if not options.chat_template:
            raise PromptError("messages need a chat template; give the prompt as text without one")
        if options.system is not None:
            if conversation.has("system"):
                raise ParameterError(
                    "system is given twice, as an option and as a message; leave one of them out"
                )
            conversation = conversation.led_by(options.system)
        template = self._template(options.chat_template, videos)
        tools = read_tools(options.tools)
        text, literals = template.render_messages(conversation, self._video_token, tools)
        return PromptText(text, self.begins(text), template.lead, literals)

    def ids(self, prompt: PromptText) -> list[int]:
        """Its token ids, one for each placeholder. Raises PromptError, BundleError."""
        if prompt.literals is None:
            return self._tokenizer.encode(prompt.text, add_special_tokens=not prompt.begun)
        return self._encode_literal(prompt.text, prompt.literals, not prompt.begun)

    def begins(self, text: str) -> bool:
        """True where a template has written the token that begins a text: no other is added."""
        return bool(self._bos) and text.startswith(str(self._bos))

    def advice(self, what: str, prompt: str | Conversation, options: GenerationOptions) -> str:
        """Advice where there are more or fewer placeholders than images or videos."""
        token = (self._image_token if what == "image" else self._video_token) or ""
        if isinstance(prompt, Conversation):
            return (
                f"the chat template has no place for {what}s in messages of some role, or writes "
                "places of its own; put them into messages of the user"
            )
        if token in prompt + (options.system or ""):
            article = "an" if what == "image" else "a"
            return (
                f"{token} stands for {article} {what}: give one for each, give messages, whose "
                f"text is text, or write it another way, as {token[:1]} {token[1:-1]} {token[-1:]}"
            )
        if options.chat_template:
            return (
                f"the chat template writes them; write the prompt out, with one {token} per "
                f"{what}, and use chat_template=False (--no-chat-template)"
            )
        return f"write one {token} per {what} where it belongs, or let the chat template do it"

    def given(self, wanted: bool | str) -> ChatTemplate | None:
        """The template that the option ``chat_template`` asks for. Raises ParameterError."""
        if isinstance(wanted, str):
            return self._given(wanted)
        return self.template if wanted else None

    def _template(self, wanted: bool | str, videos: int) -> ChatTemplate:
        own = videos and wanted is True
        template = self.video_template if own else self.given(wanted)
        if template is None:
            raise PromptError(
                "the bundle has no chat template; write the prompt out and use "
                "chat_template=False (--no-chat-template)"
            )
        return template

    def _opened(self, source: str | None) -> ChatTemplate | None:
        return ChatTemplate(source, self._special_tokens, self._image_token) if source else None

    def _own_template(self, source: str) -> ChatTemplate:
        """One that a caller gives."""
        name = "the chat_template that was given"
        template = ChatTemplate(
            source, self._special_tokens, self._image_token, name, ParameterError
        )
        if not template.writes_questions:
            raise ParameterError(
                f"{name} does not write the question; give the text of a Jinja template, "
                "True for the bundle's own or False for none"
            )
        return template
