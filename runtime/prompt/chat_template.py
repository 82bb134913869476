"""Chat templates: from a question and its images to the text of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any, Literal, NoReturn, TypeAlias

from jinja2.exceptions import SecurityError

from lvlm.core.errors import BundleError, LvlmError, PromptError
from lvlm.runtime.prompt.literal_text import Literals, has_hidden, hidden, hiding, shown
from lvlm.runtime.prompt.messages import Conversation, ImagePart, Message, Role, TextPart
from lvlm.runtime.prompt.template_budget import Budget, TemplateLimitError, budget, spending
from lvlm.runtime.prompt.template_sandbox import Sandbox
from lvlm.runtime.prompt.tools.calls import all_texts, each_text
from lvlm.runtime.prompt.tools.form import (
    CALL,
    NAME,
    TOOL,
    ToolForm,
    find_form,
    takes_tools,
    writes_calls,
)

Tools: TypeAlias = Sequence[Mapping[str, Any]]
Content = Literal["parts", "text"]
PROBED: tuple[Role, ...] = ("user", "system", "assistant")
PROBE = "lvlmprobe"


@dataclass(frozen=True)
class Turn:
    """One message of a conversation: ``images`` images and ``videos`` videos before its text."""

    role: Role
    text: str
    images: int = 0
    videos: int = 0


class ChatTemplate:
    """A chat template, run in a sandbox as transformers runs it. Any thread may use it.

    Some templates take a message's content as a list of parts, some as text, some the one for users
    and the other for the system: which is found by trying both (``content``). ``lead`` is the space
    that the template writes between "it is the assistant's turn" and an assistant's message: an
    answer begins after it.
    ``writes_questions``: whether a user's text comes out at all; ``forbidden``: what the sandbox
    has kept it from meanwhile.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        image_token: str,
        name: str = "the bundle's chat template",
        wrong: type[LvlmError] = BundleError,
    ) -> None:
        """``source`` is Jinja, ``special_tokens`` the variables it may use (``bos_token``, …),
        ``image_token`` the placeholder of an image, ``name`` and ``wrong`` say whose mistake a
        bad template is. Raises ``wrong`` if it is not valid."""
        self._special_tokens, self._source = dict(special_tokens), source
        self._image_token, self._name, self._wrong = image_token, name, wrong
        try:
            with spending(Budget()):
                environment = Sandbox()
                environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
                self._template = environment.from_string(source)
        except Exception as error:  # RecursionError and others, besides TemplateSyntaxError
            raise wrong(f"{name} is not valid: {_line(error)}") from None
        self.forbidden = ""
        self._ways: dict[str, frozenset[Content]] = {}
        self.content: dict[str, Content] = dict.fromkeys(PROBED, "parts")
        with spending(Budget()):
            written = self._find_way("user")  # first: the others' probes have a user in them
            self._find_way("system")
            self._find_way("assistant")
            self.writes_questions = written is not None
            self.places_images = written is None or image_token in written
            self._turn, self.lead = self._assistant_turn()

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
        messages = [self._message(t.role, t.text, t.images, t.videos) for t in placed]
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
        if conversation.has("tool") and not self._takes("tool"):
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
        takes = self._takes(message.role)
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

    def _takes(self, role: Role) -> frozenset[Content]:
        """How content may be given in messages of that role; nothing: it writes none of them."""
        if role not in self._ways:
            with spending(Budget()):
                ways: tuple[Content, ...] = ("parts", "text")
                tried = {way: self._tried(role, way) for way in ways}
                tried["parts"] = tried["parts"] or self._tried(role, "parts", 1)
                if role == "tool" and not any(tried.values()):
                    tried = {"text": self._tried(role, "text", called=True)}
            self._ways[role] = frozenset(way for way, text in tried.items() if text is not None)
        return self._ways[role]

    @cached_property
    def takes_tools(self) -> bool:
        """Whether it has a place for tools."""
        with spending(Budget()):
            return takes_tools(self._try_tools)

    @cached_property
    def writes_calls(self) -> bool:
        """Whether it writes the tool_calls of an assistant's message."""
        with spending(Budget()):
            return writes_calls(self._try_tools)

    @cached_property
    def tool_form(self) -> ToolForm | None:
        """How it writes calls, if it does so in a form that can be read back."""
        if not self.takes_tools:
            return None
        with spending(Budget()):
            return find_form(self._try_tools)

    def _checked(self, tools: Tools) -> Tools:
        if tools and not self.takes_tools:
            raise PromptError(
                f"tools: {self._name} has no place for tools; describe them in a system message"
            )
        return tools

    def _rendered(self, messages: list[dict[str, Any]], tools: Tools = ()) -> str:
        try:
            with spending(Budget.for_input([messages, tools])):
                return self._run(messages, tools=tools)
        except PromptError:
            raise
        except SecurityError as error:
            raise self._wrong(f"{self._name} does what templates may not: {_line(error)}") from None
        except TemplateLimitError as error:
            raise self._wrong(
                f"{self._name} asks for more than templates may: {_line(error)}; "
                "write the prompt out and use chat_template=False"
            ) from None
        except Exception as error:  # a template can raise whatever its expressions can
            raise self._wrong(
                f"{self._name} fails: {_line(error)}; "
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

    def _message(
        self,
        role: str,
        text: str,
        images: int = 0,
        videos: int = 0,
        content: Content | None = None,
    ) -> dict[str, Any]:
        if (content or self.content[role]) == "text":
            return {"role": role, "content": text}
        parts: list[dict[str, str]] = [{"type": "image"} for _ in range(images)]
        parts += [{"type": "video"} for _ in range(videos)]
        return {"role": role, "content": [*parts, {"type": "text", "text": text}]}

    def _try_tools(self, messages: list[dict[str, Any]], tools: Tools, answer: bool) -> str:
        """What it makes of messages whose contents are texts, given as it takes them."""
        given = [
            message | self._message(message["role"], message["content"]) for message in messages
        ]
        return self._run(given, answer, tools)

    def _run(self, messages: list[dict[str, Any]], answer: bool = True, tools: Tools = ()) -> str:
        variables = {
            **self._special_tokens,
            "messages": messages,
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": answer,
        }
        return self._template.render(variables)

    def lead_after(self, prompt: str) -> str:
        """``lead`` for a prompt written out that ends as the template's own do, else nothing."""
        return self.lead if self._turn and prompt.endswith(self._turn) else ""

    # What kind of template it is

    def _tried(
        self, role: str, content: Content, images: int = 0, called: bool = False
    ) -> str | None:
        """What it makes of a message of that role; None if it cannot take it that way. ``called``:
        one of role tool answers a call."""
        message = self._message(role, PROBE, images, content=content)
        user = self._message("user", "x")
        before = {"user": [], "system": [], "assistant": [user], "tool": [user]}[role]
        after = [user] if role == "system" else []
        if role == "tool":
            before.append(
                self._message("assistant", "y") | ({"tool_calls": [CALL]} if called else {})
            )
            message |= {"tool_call_id": CALL["id"], "name": NAME} if called else {}
        try:
            text = self._run(
                [*before, message, *after], role != "assistant", [TOOL] if called else []
            )
        except (SecurityError, TemplateLimitError) as error:
            self.forbidden = _line(error)
            return None
        except Exception:
            return None
        # A list that is printed as it is shows what its parts are called
        shows = content == "parts" and _shows_parts(text)
        return text if PROBE in text and not shows else None

    def _find_way(self, role: str) -> str | None:
        """How content is given in messages of that role; what is made of a probe, if anything."""
        ways: tuple[tuple[Content, int], ...] = (("parts", 1), ("parts", 0), ("text", 0))
        for content, images in ways:
            if (text := self._tried(role, content, images)) is not None:
                self.content[role] = content
                return text
        return None

    def _assistant_turn(self) -> tuple[str, str]:
        """How a prompt ends that is ready for the answer, and what the template writes between
        that and an assistant's message, where it is white space alone."""
        user, answer = self._message("user", "x" + PROBE), self._message("assistant", PROBE)
        try:
            start = self._run([user])
            whole = self._run([user, answer], answer=False)
        except Exception:
            return "", ""
        between, found, _ = whole.removeprefix(start).partition(PROBE)
        if not (whole.startswith(start) and found and between.isspace()):
            return "", ""
        return start.rpartition(PROBE)[2].lstrip(), between


def _shows_parts(text: str) -> bool:
    return "'type'" in text or '"type"' in text


def _refuse(message: object) -> NoReturn:
    raise PromptError(f"the chat template refuses the prompt: {_line(message)}")


def _now(pattern: str) -> Any:
    budget().make(256 * len(pattern))
    made = datetime.now().strftime(shown(pattern))
    return hidden(made) if has_hidden(pattern) else made


def _line(message: object) -> str:
    return " ".join(str(shown(str(shown(message)))).split())[:300]
