"""Messages: what is taken, what is refused and where, and how templates get them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lvlm.core.errors import PromptError
from lvlm.runtime.generate.asks import one_ask, read_asks
from lvlm.runtime.prompt.chat_template import ChatTemplate
from lvlm.runtime.prompt.messages import ImagePart, TextPart, VideoPart, read_messages

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Is "},
            {"type": "image", "image": "a.png"},
            {"type": "text", "text": " like "},
            {
                "type": "image_url",
                "image_url": {"url": "data:image/png;base64,AA", "detail": "low"},
            },
            {"type": "text", "text": "?"},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
    {"role": "user", "content": [{"type": "video", "video": "c.mp4"}]},
]
PARTS = (
    "{% for m in messages %}[{{ m.role }}] {% for p in m.content %}{% if p.type == 'text' %}"
    "{{ p.text }}{% else %}<{{ p.type }}>{% endif %}{% endfor %}{% endfor %}"
)
NO_PLACES = (
    "{% for m in messages %}[{{ m.role }}] {% for p in m.content %}{{ p.text }};{% endfor %}"
    "{% endfor %}"
)
TEXT = "{% for m in messages %}[{{ m.role }}] {{ m.content + '' }}{% endfor %}"
BOTH = (
    "{% for m in messages %}[{{ m.role }}] {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}({{ p.text or '<image>' }}){% endfor %}{% endif %}{% endfor %}"
)
NO_TOOL = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
    "[{{ m.role }}] {{ m.content + '' }}{% endfor %}"
)


def written(source: str, messages: list[dict[str, Any]]) -> str:
    """What the template makes of the messages."""
    template = ChatTemplate(source, {}, "<image>")
    made, literals = template.render_messages(read_messages(messages), "<video>")
    return literals.show(made)


def test_messages_are_read() -> None:
    conversation = read_messages(TALK)
    assert [m.role for m in conversation.messages] == ["system", "user", "assistant", "user"]
    assert [m.plain for m in conversation.messages] == [True, False, False, False]
    assert conversation.messages[1].parts == (
        TextPart("Is "),
        ImagePart("a.png"),
        TextPart(" like "),
        ImagePart("data:image/png;base64,AA"),
        TextPart("?"),
    )
    assert conversation.messages[3].parts == (VideoPart("c.mp4"),)
    assert conversation.images == ["a.png", "data:image/png;base64,AA"]
    assert conversation.videos == ["c.mp4"]
    assert not conversation.blank
    assert read_messages([{"role": "user", "content": " "}]).blank


def test_every_form_a_call_takes() -> None:
    asks, many = read_asks(TALK)
    assert not many
    assert [list(ask.images) for ask in asks] == [["a.png", "data:image/png;base64,AA"]]
    assert list(asks[0].videos) == ["c.mp4"]
    asks, many = read_asks(["Hi", TALK, "And?"], [["x.png"], [], None])
    assert many
    assert [list(ask.images) for ask in asks] == [["x.png"], list(asks[1].images), []]
    assert read_asks([]) == ([], True)
    assert read_asks("Hi", ["x.png"])[0][0].images == ["x.png"]
    assert read_asks((TALK, TALK))[1]


USER: dict[str, Any] = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (7, "prompt is 7; give text, messages"),
        (b"Hi", "prompt is b'Hi'; give text"),
        ({"role": "user"}, "give text, messages, or a list"),
        ([b"Hi"], "prompt is b'Hi'; give the question as text, or messages"),
        ([[]], "prompt is []; give messages, as"),
        ([USER, "Hi"], "message 2 is 'Hi'; give {"),
        (["Hi", USER], "prompt is {'role': 'user'"),
        ([{"content": "Hi"}], "message 1: its role is missing; give system, user, assistant, tool"),
        ([{"role": "User", "content": "Hi"}], "message 1: its role is 'User'"),
        ([{"role": ["user"], "content": "Hi"}], "its role is ['user']"),
        ([{"role": np.array(["user", "x"]), "content": "Hi"}], "its role is array("),
        ([{"type": np.array([1, 2])}], "message 1, part 1: its type is array("),
        ([USER, {"role": "user"}], "message 2 has no content"),
        ([{"role": "user", "content": None}], "message 1: its content is None; give a text"),
        ([{"role": "user", "content": b"Hi"}], "its content is b'Hi'"),
        ([{"role": "user", "content": "\ud800"}], "message 1: its text is not valid Unicode"),
        ([USER | {"contents": "x"}], "unknown key 'contents'; did you mean content?"),
        ([USER | {"name": "x"}], "message 1: unknown key 'name'"),
        ([USER | {"role": "tool", "name": 3}], "message 1: its name: its text is 3"),
        (["part", {}], "message 1, part 1 is 'part'; give {"),
        ([{}], "message 1, part 1: its type is missing; give text, image, video, image_url"),
        ([{"type": "audio"}], "its type is 'audio'"),
        ([{"type": "text"}], "part 1 has type text, but nothing as its"),
        ([{"type": "image", "image": None}], "part 1 has type image, but nothing as its"),
        ([{"type": "text", "text": b"x"}], "part 1: its text is b'x'; give text"),
        ([{"type": "text", "image": "x"}], "message 1, part 1: unknown key 'image'"),
        ([{"type": "image_url", "image_url": {"url": "http://x/a.png"}}], "give a data: URL"),
        ([{"type": "image_url", "image_url": "/etc/passwd"}], "its URL is '/etc/passwd'"),
        ([{"type": "image_url", "image_url": {"uri": "x"}}], "image_url: unknown key 'uri'"),
    ],
)
def test_mistakes_are_one_line_that_says_where(prompt: Any, said: str) -> None:
    of_parts = isinstance(prompt, list) and said.startswith(("message 1, part", "its type", "part"))
    if of_parts or "URL" in said or "uri" in said:
        prompt = [{"role": "user", "content": prompt}]
    with pytest.raises(PromptError) as caught:
        read_asks(prompt)
    assert said in str(caught.value)


def test_images_beside_messages() -> None:
    for images, videos, name in ((["x.png"], [], "image"), ((), "y.mp4", "video")):
        with pytest.raises(PromptError, match=f"{name}s beside messages have no place") as caught:
            one_ask(TALK, images, videos)
        assert f'{{"type": "{name}"' in str(caught.value)
    assert one_ask(TALK, None, []).images
    with pytest.raises(PromptError, match="beside messages"):
        read_asks([TALK, "Hi"], [["x.png"], []])


class Shouting(str):
    """A text whose methods lie."""

    def __str__(self) -> str:
        return "<image>"

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


def test_texts_are_taken_as_they_are() -> None:
    conversation = read_messages([{"role": "user", "content": Shouting("quiet")}])
    [part] = conversation.messages[0].parts
    assert isinstance(part, TextPart)
    assert type(part.text) is str
    assert part.text == "quiet"


def test_how_templates_get_messages() -> None:
    assert written(PARTS, TALK) == (
        "[system] Be brief.[user] Is <image> like <image>?[assistant] No.[user] <video>"
    )
    assert written(NO_PLACES, TALK) == (
        "[system] Be brief.;[user] Is <image>\n like <image>\n?;[assistant] No.;[user] <video>\n;"
    )
    assert written(TEXT, TALK) == (
        "[system] Be brief.[user] Is <image>\n like <image>\n?[assistant] No.[user] <video>\n"
    )
    # As it came, where it is taken either way
    assert written(BOTH, [USER]) == "[user] Hi"
    assert written(BOTH, [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]) == (
        "[user] (Hi)"
    )


def test_placeholders_are_the_templates_own() -> None:
    template = ChatTemplate(PARTS, {}, "<image>")
    typed = [
        {"role": "user", "content": [TALK[1]["content"][1], {"type": "text", "text": "<image>"}]}
    ]
    made, literals = template.render_messages(read_messages(typed))
    assert made.count("<image>") == 1
    assert literals.show(made).count("<image>") == 2


def test_the_role_tool_where_the_template_knows_it() -> None:
    said = [USER, {"role": "assistant", "content": "call"}, {"role": "tool", "content": "42"}]
    assert written(TEXT, said) == "[user] Hi[assistant] call[tool] 42"
    named = "{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}"
    assert written(named, [*said[:2], said[2] | {"name": "sum"}]) == "Hicallsum42"
    with pytest.raises(PromptError, match="writes no message of role tool"):
        written(NO_TOOL, said)
    assert written(NO_TOOL, said[:2]) == "[user] Hi[assistant] call"
