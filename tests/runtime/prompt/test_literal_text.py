"""Text of messages in a chat template: written as it would be, and told apart when it comes out."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lvlm.core.errors import BundleError, PromptError
from lvlm.runtime.prompt.chat_template import ChatTemplate, Turn
from lvlm.runtime.prompt.literal_text import Literals
from lvlm.runtime.prompt.messages import Conversation, Message, TextPart

# What templates do with content, here ``c``; and what nobody would, but might
EXPRESSIONS = [
    "{{ c | trim }}",
    "{{ c.strip() ~ '.' }}",
    "{{ (' ' + c + ' ') | trim }}",
    "{{ c.strip('<ä') }}",
    "{{ c | trim('x ') }}",
    "{{ (c ~ '>').rstrip('>').lstrip() }}",
    "{{ c.removeprefix('<x').removesuffix('>') }}",
    "{{ c | upper }}{{ c.lower() }}{{ c | capitalize }}{{ c.title() }}{{ c.swapcase() }}",
    "{{ ('<' ~ c) | title }}{{ c.casefold() }}",
    "{{ c.split('x')[-1].lstrip('\\n') }}",
    "{{ c.split() | join('+') }}{{ c.rsplit(none, 1) | join('+') }}",
    "{{ c.rsplit('>', 1)[0] }}{{ c.split(none, 1) | last }}",
    "{{ c.partition('x')[2] }}{{ c.rpartition('x') | join('|') }}",
    "{{ c.splitlines() | join('+') }}{{ c.splitlines(true)[0] }}",
    "{% if '<x' in c and c.startswith('<') %}yes{{ c.index('x') }}{% endif %}",
    "{% if c == 'x' or c is eq('ä') or c in ['<x>', 'ß'] %}same{% endif %}",
    "{{ c | length }}{{ c.count('x') }}{{ c.find('ä') }}{{ c | wordcount }}",
    "{{ c is upper }}{{ c.isspace() }}{{ c.isalpha() }}{{ c is string }}{{ c | int }}",
    "{{ c[0] }}{{ c[1:] }}{{ c[::-1] }}{{ c | first }}{{ c | last }}{{ c | reverse }}",
    "{% for l in c %}{{ loop.index }}{{ l }}{% if l == '<' %}!{% endif %}{% endfor %}",
    "{{ c.replace('x', '<') }}{{ c | replace('<', 'ä') }}{{ 'xx'.replace('x', c, 1) }}",
    "{{ c | replace('', '-') }}{{ c.replace(c, 'all') }}{{ c | replace('x', '', 1) }}",
    "{{ c | tojson }}{{ {'a': c} | tojson(indent=2) }}{{ messages[0] | tojson }}",
    "{{ [c] }}{{ {'k': c} }}{{ {c: 1} }}{{ [c] | string }}{{ {c: 2}[c] }}{{ (c,) ~ '' }}",
    "{{ '%s:%s' % (c, 1) }}{{ '%5s' | format(c) }}{{ '%r' % c }}{{ '%s' % [c] }}",
    "{{ '{}|{:>9}|{!r}'.format(c, c, c) }}{{ '{a}'.format_map({'a': c}) }}",
    "{{ c | center(9) }}{{ c.ljust(9) }}{{ c.zfill(7) }}{{ c | indent(2, true) }}",
    "{{ c | e }}{{ c | urlencode }}{{ c | truncate(4, true) }}{{ c.expandtabs(4) }}",
    "{{ [c, 'x'] | join(c) }}{{ [[c], 2] | join(',') }}{{ c | default('none') }}",
    "{{ [c, 'x'] | map('upper') | join }}{{ [c, 'x'] | select('eq', 'x') | list | length }}",
    "{{ [c] | map('trim') | map('replace', 'x', '<') | join }}{{ [c].index(c) }}",
    "{{ {'x': 'key', '<x>': 'other'}.get(c, 'none') }}{{ {'x': 'key'}[c] }}{{ c * 2 }}",
    "{% macro m(t) %}[{{ t | trim }}]{% endmacro %}{{ m(c) | upper }}{{ strftime_now(c) }}",
    "{% set n = namespace(t=c) %}{% set n.t = n.t + c %}{{ n.t.split('<') | length }}{{ n.t }}",
    "{{ c if c else 'empty' }}{{ (c | list)[0] }}{{ c.join(['1', '2']) }}{{ dict(a=c).a }}",
    "{% for a, b in {c: 'v'}.items() %}{{ a }}{{ b }}{% endfor %}{{ 'x'.startswith(c) }}",
]
ONLY_USERS = set("äβßÄΒ")  # and whatever becomes of these


# Where they stand: Jinja gives calls in loops and blocks more than their arguments
FRAMES = ("%s", "{%% for c in [c] %%}%s{%% endfor %%}", "{%% block b scoped %%}%s{%% endblock %%}")


def chat(expression: str) -> ChatTemplate:
    source = "{% set c = messages[0]['content'] %}{{ c }}|" + expression
    return ChatTemplate(source, {}, "<image>")


def conversation(*texts: str) -> Conversation:
    return Conversation(tuple(Message("user", (TextPart(t),), plain=True) for t in texts))


TEMPLATES = [[chat(frame % one) for frame in FRAMES] for one in EXPRESSIONS]


@pytest.mark.parametrize("number", range(len(EXPRESSIONS)), ids=EXPRESSIONS)
@given(text=st.text("äβß <>x\n\t\"'%{}|\\\U000f0000", max_size=12), frame=st.integers(0, 2))
@example(text="<x ä>", frame=0)
@example(text="<x ä>", frame=1)
@example(text="<x ä>", frame=2)
def test_templates_write_what_they_write_of_text(number: int, text: str, frame: int) -> None:
    template = TEMPLATES[number][frame]
    try:
        expected = template.render_turns([Turn("user", text)])
    except BundleError:  # nothing there to index, say
        with pytest.raises(BundleError):
            template.render_messages(conversation(text))
        return
    made, literals = template.render_messages(conversation(text))
    assert literals.show(made) == expected
    plain = {c for c, literal in zip(made, literals.marks(made), strict=True) if not literal}
    assert not plain & (ONLY_USERS - set(EXPRESSIONS[number]))
    assert literals.marks(made)[: len(text)] == [True] * len(text)


def test_special_tokens_in_pieces_are_still_text() -> None:
    """A template that puts texts together, or next to its own."""
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content | trim }}{% endfor %}{{ '<' ~ messages[0].content }}"
        "{{ '|>' }}<|end|>",
        {},
        "<image>",
    )
    made, literals = template.render_messages(conversation("<|im", "_end|>", "<|end|>"))
    assert literals.runs(made) == [
        ("<|im_end|><|end|>", True),
        ("<", False),
        ("<|im", True),
        ("|><|end|>", False),
    ]


def test_private_characters_of_anybody_are_left_alone() -> None:
    template = ChatTemplate(
        "\U000f0000{{ messages[0].content }}{{ eos }}", {"eos": "\U000f0001"}, "i"
    )
    made, literals = template.render_messages(conversation("a\U000f0002\U000f0000b"))
    assert literals.runs(made) == [
        ("\U000f0000", False),
        ("a\U000f0002\U000f0000b", True),
        ("\U000f0001", False),
    ]


def test_more_characters_than_there_are_private_ones() -> None:
    with pytest.raises(PromptError, match="too many different characters"):
        Literals([]).hide("".join(map(chr, range(0xE000, 0x110000))))


def test_what_a_template_says_of_a_text() -> None:
    template = ChatTemplate(
        "{% set c = messages[0].content %}{{ c }}{{ raise_exception([c]) if 'ask' in c }}", {}, ""
    )
    with pytest.raises(PromptError, match="refuses the prompt: \\['ask <me>'\\]"):
        template.render_messages(conversation("ask <me>"))
    template = ChatTemplate(
        "{% set c = messages[0].content %}{{ c }}{{ {}[c].x if 'ask' in c }}", {}, ""
    )
    with pytest.raises(BundleError, match="no attribute 'ask <me>'"):
        template.render_messages(conversation("ask <me>"))
