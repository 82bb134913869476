"""Chat templates: from a question and its images to the text of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2.exceptions import SecurityError

from lvlm.core.errors import PromptError
from lvlm.runtime.prompt.literal_text import Literals, hiding
from lvlm.runtime.prompt.messages import Conversation, ImagePart, Message, Role, TextPart
from lvlm.runtime.prompt.template_budget import Budget, TemplateLimitError, spending
from lvlm.runtime.prompt.template_kind import TemplateKind, Tools, line_of
from lvlm.runtime.prompt.tools.tool_calls import all_texts, each_text


@dataclass(frozen=True)
class Turn:
    """One message of a conversation: ``images`` images and ``videos`` videos before its text."""

    role: Role
    text: str
    images: int = 0
    videos: int = 0


class ChatTemplate(TemplateKind):
    """A chat template, run in a sandbox as transformers runs it. Any thread may use it."""

    def render(
        self,
        prompt: str,
        images: int,
        system: str | None = None,
        videos: int = 0,
        video_token: str | None = None,
        tools: Tools = (),
    ) -> str:
        """The text of a user message, ``images`` images and ``videos`` videos before ``prompt``,
        ready for the answer. ``system`` is the text of a system message. Raises as render_turns."""
        turns = [] if system is None else [Turn("system", system)]
        turns.append(Turn("user", prompt, images, videos))
        return self.render_turns(turns, video_token, tools)

    def render_turns(
        self, turns: Sequence[Turn], video_token: str | None = None, tools: Tools = ()
    ) -> str:
        """The text of a conversation, ready for the next answer.

        A text that has the placeholder of images or videos in it keeps its own places: no others
        of these are added to that turn. With a template that writes no placeholders they are
        written before the text, each on a line of its own. Raises ``PromptError`` if the template
        refuses the messages, ``BundleError`` if it fails, reaches for what the sandbox forbids or
        asks for too much work.
        """
        placed = [self._placed(turn, video_token) for turn in turns]
        messages = [self.message(t.role, t.text, t.images, t.videos) for t in placed]
        return self._rendered(messages, self._checked(tools))

    def render_messages(
        self, conversation: Conversation, video_token: str | None = None, tools: Tools = ()
    ) -> tuple[str, Literals]:
        """The text of a conversation, ready for the next answer. What the messages say is hidden in
        it (literal_text.py): placeholders and special tokens there are the template's own.

        Content is given as it came, text or parts, where the template takes it that way for that
        role. Where it writes no placeholders, or takes text alone, each is written in its part's
        place, with the line ended after it. Raises as render_turns, and PromptError for a role
        tool or for calls that the template does not write.
        """
        if conversation.has("tool") and not self.takes("tool"):
            raise PromptError(
                "the chat template writes no message of role tool; give its text in a user's"
            )
        if any(message.calls for message in conversation.messages) and not self.writes_calls:
            raise PromptError(
                "the chat template writes no tool_calls; give them as text of the assistant's "
                "message"
            )
        texts = [text for message in conversation.messages for text in message.texts]
        texts += all_texts(list(self._checked(tools)))
        literals = Literals([self._source, *self._special_tokens.values(), *texts])
        messages = [self._given(m, literals, video_token) for m in conversation.messages]
        hidden_tools = each_text(list(tools), literals.hide)
        with hiding(literals):
            return self._rendered(messages, hidden_tools), literals

    def _given(
        self, message: Message, literals: Literals, video_token: str | None
    ) -> dict[str, Any]:
        """A message as the template takes it."""
        tokens = {"image": self._image_token, "video": video_token or ""}
        parts: list[dict[str, str]] = []
        for part in message.parts:
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": literals.hide(part.text)})
            else:
                parts.append({"type": "image" if isinstance(part, ImagePart) else "video"})
        takes = self.takes(message.role)
        media = any(part["type"] != "text" for part in parts)
        as_text = "text" in takes and (message.plain or "parts" not in takes)
        content: str | list[dict[str, str]] = parts
        if as_text or (media and not self.places_images):
            text = "".join([p["text"] if "text" in p else f"{tokens[p['type']]}\n" for p in parts])
            content = text if as_text else [{"type": "text", "text": text}]
        extra = {key: literals.hide(text) for key, text in message.extra.items()}
        called = [call.written(literals.hide) for call in message.calls]
        given = {"role": message.role, "content": content, **extra}
        return given | {"tool_calls": called} if called else given

    def _checked(self, tools: Tools) -> Tools:
        if tools and not self.takes_tools:
            raise PromptError(
                f"tools: {self._name} has no place for tools; describe them in a system message"
            )
        return tools

    def _rendered(self, messages: list[dict[str, Any]], tools: Tools = ()) -> str:
        try:
            with spending(Budget.for_input([messages, tools])):
                return self.run(messages, tools=tools)
        except PromptError:
            raise
        except SecurityError as error:
            raise self._wrong(
                f"{self._name} does what templates may not: {line_of(error)}"
            ) from None
        except TemplateLimitError as error:
            raise self._wrong(
                f"{self._name} asks for more than templates may: {line_of(error)}; "
                "write the prompt out and use chat_template=False"
            ) from None
        except Exception as error:  # a template can raise whatever its expressions can
            raise self._wrong(
                f"{self._name} fails: {line_of(error)}; "
                "write the prompt out and use chat_template=False"
            ) from None

    def _placed(self, turn: Turn, video_token: str | None) -> Turn:
        """The turn with as many images and videos as the template is to write placeholders for."""
        images = 0 if self._image_token in turn.text else turn.images
        videos = 0 if video_token and video_token in turn.text else turn.videos
        if self.places_images:
            return replace(turn, images=images, videos=videos)
        text = f"{self._image_token}\n" * images + turn.text
        text = f"{video_token}\n" * videos + text if video_token else text
        return replace(turn, text=text, images=0, videos=0)

    def lead_after(self, prompt: str) -> str:
        """``lead`` for a prompt written out that ends as the template's own do, else nothing."""
        return self.lead if self._turn and prompt.endswith(self._turn) else ""
