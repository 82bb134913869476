"""Kind of a chat template, found out by running it on messages that are made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, Literal, NoReturn, TypeAlias

from jinja2.exceptions import SecurityError

from lvlm.core.errors import BundleError, LvlmError, PromptError
from lvlm.runtime.prompt.literal_text import has_hidden, hidden, shown
from lvlm.runtime.prompt.messages import Role
from lvlm.runtime.prompt.template_budget import Budget, TemplateLimitError, budget, spending
from lvlm.runtime.prompt.template_sandbox import Sandbox
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


class TemplateKind:
    """A chat template, compiled, and what it takes and writes. Any thread may use it.

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
            raise wrong(f"{name} is not valid: {line_of(error)}") from None
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

    def run(self, messages: list[dict[str, Any]], answer: bool = True, tools: Tools = ()) -> str:
        """Text that the template writes, within the budget that is being spent. Raises whatever it
        raises."""
        variables = {
            **self._special_tokens,
            "messages": messages,
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": answer,
        }
        return self._template.render(variables)

    def message(
        self,
        role: str,
        text: str,
        images: int = 0,
        videos: int = 0,
        content: Content | None = None,
    ) -> dict[str, Any]:
        """A message, its images and videos before its text, as the template takes one."""
        if (content or self.content[role]) == "text":
            return {"role": role, "content": text}
        parts: list[dict[str, str]] = [{"type": "image"} for _ in range(images)]
        parts += [{"type": "video"} for _ in range(videos)]
        return {"role": role, "content": [*parts, {"type": "text", "text": text}]}

    def takes(self, role: Role) -> frozenset[Content]:
        """Ways to give content in messages of that role; none: it writes none of them."""
        if role not in self._ways:
            with spending(Budget()):
                ways: tuple[Content, ...] = ("parts", "text")
                tried = {way: self._tried(role, way) for way in ways}
                tried["parts"] = tried["parts"] or self._tried(role, "parts", 1)
                if role == "tool" and not any(tried.values()):
                    tried = {"text": self._tried(role, "text", called=True)}
            self._ways[role] = frozenset(way for way, text in tried.items() if text is not None)
        return self._ways[role]

    @property
    def dated(self) -> bool:
        """True where it may write another text on another day."""
        return "strftime_now" in self._source

    @cached_property
    def takes_tools(self) -> bool:
        """True where it has a place for tools."""
        with spending(Budget()):
            return takes_tools(self._try_tools)

    @cached_property
    def writes_calls(self) -> bool:
        """True where it writes the tool_calls of an assistant's message."""
        with spending(Budget()):
            return writes_calls(self._try_tools)

    @cached_property
    def tool_form(self) -> ToolForm | None:
        """Form in which it writes calls, if it does so in a form that can be read back."""
        if not self.takes_tools:
            return None
        with spending(Budget()):
            return find_form(self._try_tools)

    def _try_tools(self, messages: list[dict[str, Any]], tools: Tools, answer: bool) -> str:
        """Text that it makes of messages whose contents are texts, given as it takes them."""
        given = [
            message | self.message(message["role"], message["content"]) for message in messages
        ]
        return self.run(given, answer, tools)

    def _tried(
        self, role: str, content: Content, images: int = 0, called: bool = False
    ) -> str | None:
        """Text that it makes of a message of that role; None if it cannot take it that way.
        ``called``: one of role tool answers a call."""
        message = self.message(role, PROBE, images, content=content)
        user = self.message("user", "x")
        before = {"user": [], "system": [], "assistant": [user], "tool": [user]}[role]
        after = [user] if role == "system" else []
        if role == "tool":
            before.append(
                self.message("assistant", "y") | ({"tool_calls": [CALL]} if called else {})
            )
            message |= {"tool_call_id": CALL["id"], "name": NAME} if called else {}
        try:
            text = self.run(
                [*before, message, *after], role != "assistant", [TOOL] if called else []
            )
        except (SecurityError, TemplateLimitError) as error:
            self.forbidden = line_of(error)
            return None
        except Exception:
            return None
        # A list that is printed as it is shows what its parts are called
        shows = content == "parts" and _shows_parts(text)
        return text if PROBE in text and not shows else None

    def _find_way(self, role: str) -> str | None:
        """Find how content is given in messages of that role; the text made of a probe, if any."""
        ways: tuple[tuple[Content, int], ...] = (("parts", 1), ("parts", 0), ("text", 0))
        for content, images in ways:
            if (text := self._tried(role, content, images)) is not None:
                self.content[role] = content
                return text
        return None

    def _assistant_turn(self) -> tuple[str, str]:
        """End of a prompt that is ready for the answer, and the text that the template writes
        between that and an assistant's message, where it is white space alone."""
        user, answer = self.message("user", "x" + PROBE), self.message("assistant", PROBE)
        try:
            start = self.run([user])
            whole = self.run([user, answer], answer=False)
        except Exception:
            return "", ""
        between, found, _ = whole.removeprefix(start).partition(PROBE)
        if not (whole.startswith(start) and found and between.isspace()):
            return "", ""
        return start.rpartition(PROBE)[2].lstrip(), between


def _shows_parts(text: str) -> bool:
    return "'type'" in text or '"type"' in text


def _refuse(message: object) -> NoReturn:
    raise PromptError(f"the chat template refuses the prompt: {line_of(message)}")


def _now(pattern: str) -> Any:
    budget().make(256 * len(pattern))
    made = datetime.now().strftime(shown(pattern))
    return hidden(made) if has_hidden(pattern) else made


def line_of(message: object) -> str:
    return " ".join(str(shown(str(shown(message)))).split())[:300]
