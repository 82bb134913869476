"""Chat templates: as transformers renders them, in all shapes, within bounds."""

from __future__ import annotations

import pytest

from lvlm.runtime.chat_template import ChatTemplate
from lvlm.runtime.errors import BundleError, PromptError

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
