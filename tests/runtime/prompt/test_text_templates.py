"""Chat templates: as transformers renders them, in all shapes, within bounds."""

from __future__ import annotations

import re

import pytest

from lvlm.core.errors import BundleError, PromptError
from lvlm.runtime.prompt.chat_template import ChatTemplate, Turn

LLAVA = (
    "{% for message in messages %}"
    "{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def template(source: str, **special_tokens: str) -> ChatTemplate:
    return ChatTemplate(source, special_tokens, "<image>")


def test_chat_template() -> None:
    chat = template(LLAVA)
    assert chat.render("Hi", images=0) == "USER: Hi ASSISTANT:"
    assert chat.render("Hi", images=2) == "USER: <image>\n<image>\nHi ASSISTANT:"
    assert chat.render("Hi", 1, system="Be brief.") == (
        "SYSTEM: Be brief. USER: <image>\nHi ASSISTANT:"
    )
    # Places that the prompt has already are not doubled
    assert chat.render("A <image> B", images=1) == "USER: A <image> B ASSISTANT:"


@pytest.mark.parity
def test_template_environment_is_that_of_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (
        "{{ bos_token }}{% if tools is not none or documents %}tools{% endif %}\n"
        "{% for message in messages %}\n"
        "  {% if loop.first %}{% continue %}{% endif %}\n"
        "{% generation %}{{ message | tojson }}{% endgeneration %}\n"
        "{{ strftime_now('%Y') }}{{ {'b': '<é>', 'a': 1} | tojson(indent=2, sort_keys=True) }}\n"
        "{% endfor %}{% if add_generation_prompt %}go{% endif %}"
    )
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<é>"}]},
    ]
    rendered, _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    assert template(source, bos_token="<s>").render("<é>", 1, system="s") == rendered[0]


def test_special_tokens_cannot_replace_the_messages() -> None:
    assert template("{{ messages | length }}", messages="x", self="y").render("Hi", 0) == "1"


def test_template_may_refuse() -> None:
    with pytest.raises(PromptError, match="no system role please"):
        template("{{ raise_exception('no system\nrole please') }}").render("Hi", 0)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ range.__globals__['os'].system('true') }}",
        "{{ ''['__class__'] }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ (''|attr('__class__')) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__ }}",
    ],
)
def test_sandbox_holds(source: str) -> None:
    with pytest.raises(BundleError, match="does what templates may not"):
        template(source).render("Hi", 0)


@pytest.mark.parametrize(
    "source", ["{{ 1 // 0 }}", "{{ nothing.at.all }}", "{{ messages + 1 }}", "{{ lipsum() }}"]
)
def test_template_that_fails(source: str) -> None:
    with pytest.raises(BundleError, match="chat template fails") as caught:
        template(source).render("Hi", 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{", "{% generation %}", "{{ x | nofilter }}", "{% include 'x' %}"]
)
def test_template_that_is_not_valid(source: str) -> None:
    with pytest.raises(BundleError, match="is not valid"):
        template(source)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}<|im_end|>\n"
    "{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' or 'image' in p %}"
    "<|vision_start|><image><|vision_end|>{% elif 'text' in p %}{{ p['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_TOOLS = (
    "{{- bos_token }}{%- set found = namespace(system='') %}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set found.system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
    "{%- endif %}<|system|>Date: {{ strftime_now('%d %b %Y') }}\n\n"
    "{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\n\n' }}"
    "{%- endfor %}{%- endif %}{{- found.system }}<|end|>"
    "{%- for message in messages %}"
    "{%- if not (message.role == 'tool' or 'tool_calls' in message) %}"
    "{{- '<|' + message['role'] + '|>\n' + message['content'] | trim + '<|end|>' }}"
    "{%- else %}{{- raise_exception('no tools here') }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"
)
SMOL = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
STRINGS = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MIXED = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n"
    "{% else %}USER: {% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n"
    "{% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}ASSISTANT:"
)
FIXED_PLACE = "Q: <image> {{ messages[0]['content'][1]['text'] }} A:"
ALL = {
    "llava": (LLAVA, {"user": "parts", "system": "parts", "assistant": "parts"}, " "),
    "chatml": (CHATML, {"user": "parts", "system": "parts", "assistant": "parts"}, ""),
    "tools": (WITH_TOOLS, {"user": "text", "system": "text", "assistant": "text"}, ""),
    "smolvlm": (SMOL, {"user": "parts", "system": "parts", "assistant": "parts"}, " "),
    "strings": (STRINGS, {"user": "text", "system": "text", "assistant": "text"}, " "),
    "mixed": (MIXED, {"user": "parts", "system": "text", "assistant": "parts"}, ""),
    "fixed place": (FIXED_PLACE, {"user": "parts", "system": "parts", "assistant": "parts"}, ""),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", ALL)
def test_how_content_is_given_and_what_is_made_of_it(name: str) -> None:
    """The same text as transformers, for content as the template wants it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source, content, lead = ALL[name]
    chat = template(source, bos_token="<s>")
    assert chat.content == content
    assert chat.lead == lead
    for images, system in ((0, None), (2, None), (1, "Be brief.")):
        if name == "fixed place" and (images, system) != (1, None):
            continue
        placed = 0 if content["user"] == "text" else images
        text = "<image>\n" * (images - placed) + "Which?"
        parts = [{"type": "image"}] * placed + [{"type": "text", "text": text}]
        user = {"role": "user", "content": text if content["user"] == "text" else parts}
        said = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
        said |= {"content": "Be brief."} if content["system"] == "text" else {}
        theirs, _ = render_jinja_template(
            [[said, user] if system else [user]],
            chat_template=source,
            add_generation_prompt=True,
            bos_token="<s>",
        )
        assert chat.render("Which?", images, system) == theirs[0]


@pytest.mark.parity
@pytest.mark.parametrize("name", [n for n in ALL if n != "fixed place"])
def test_conversations_are_written_as_transformers_writes_them(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source, content, _ = ALL[name]
    said = (("system", "Be brief."), ("user", "Which?"), ("assistant", "Two."), ("user", "And?"))
    messages = [
        {"role": r, "content": text if content[r] == "text" else [{"type": "text", "text": text}]}
        for r, text in said
    ]
    theirs, _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    ours = template(source, bos_token="<s>").render_turns([Turn(*turn) for turn in said])
    assert ours == theirs[0]
    assert "Two." in ours


def test_each_turn_has_its_own_images() -> None:
    turns = [Turn("user", "1", 1), Turn("assistant", "2"), Turn("user", "3", 2)]
    turns.append(Turn("user", "<image> 4", 1))  # has its place
    for source in (LLAVA, STRINGS):
        between = re.split("[1234]", template(source).render_turns(turns))
        assert [part.count("<image>") for part in between] == [1, 0, 2, 1, 0]


def test_images_have_places_where_the_template_has_none() -> None:
    chat = template(STRINGS)
    assert chat.render("Hi", 2) == "USER: <image>\n<image>\nHi ASSISTANT:"
    assert chat.render("A <image> B", 1) == "USER: A <image> B ASSISTANT:"
    assert chat.render("Hi", 1, videos=1, video_token="<video>") == (
        "USER: <video>\n<image>\nHi ASSISTANT:"
    )


@pytest.mark.parametrize(
    ("source", "lead"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
         "{{ 'assistant:' if add_generation_prompt }}", " "),
        ("{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
         "{{ 'assistant:' if add_generation_prompt }}", ""),
        ("{% for m in messages %}{{ m.role }}: <think></think>{{ m.content }}\n{% endfor %}"
         "{{ 'assistant:' if add_generation_prompt }}", ""),
        ("{{ messages[0].content }}", ""),
        ("{{ raise_exception('no') if messages[1] }}{{ messages[0].content }}", ""),
    ],
)  # fmt: skip
def test_the_space_before_an_answer_is_the_templates(source: str, lead: str) -> None:
    assert template(source).lead == lead
