# ruff: noqa: E501
"""Chat templates that would take all memory, or for ever: one line, soon, in little memory."""

from __future__ import annotations

import resource

import pytest

from lvlm.core.errors import BundleError
from lvlm.runtime.prompt.chat_template import ChatTemplate

# Each would take gigabytes or hours without bounds
TOO_MUCH = """
{{ 'a' * 10**10 }}
{{ 2**10000000000 }}
{{ (-3) ** 10000000 }}
{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}
{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{% for i in range(99999) %}{% for j in range(99999) if false %}x{% endfor %}{% endfor %}
{% set ns = namespace(s='aaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}
{% set ns = namespace(s='aaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}
{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}
{% set n = namespace(s=1) %}{% for i in range(60) %}{% set n.s = [n.s] * 2 %}{% endfor %}{{ n.s }}
{% set n = namespace(s=1) %}{% for i in range(60) %}{% set n.s = (n.s,)*2 %}{% endfor %}{{ {n.s: 1} }}
{% set n = namespace(s=1) %}{% for i in range(9000) %}{% set n.s = (n.s,) %}{% endfor %}{{ {}[n.s] }}
{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}
{% macro f() %}{{ caller() }}{% endmacro %}{% for i in range(99999) %}{% call f() %}{% endcall %}{% endfor %}
{{ 'a'.center(10000000000) }}
{{ 'a' | center(10000000000) }}
{{ '%10000000000d' % 1 }}
{{ '%(a(b))10000000000d' % {'a(b)': 1} }}
{{ '%*d' % (10000000000, 1) }}
{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}
{{ '{:10000000000}'.format(1) }}
{{ '{:{}}'.format(1, 10000000000) }}
{{ ('{0}' * 100000).format('x' * 100000) }}
{{ '%10000000000d' | format(1) }}
{{ [1] | batch(10000000000, 'x') | list }}
{{ [1] | slice(10000000000) | list }}
{{ 1.5 | round(1000000000, 'ceil') }}
{{ [1] | tojson(indent=1000000000) }}
{{ 'a' | indent(1000000000, true) }}
{{ ('x' * 1000000) | replace('', 'y' * 1000000) }}
{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}
{{ ('x' * 100000).join(range(99999) | map('string')) }}
{% set s = 'x' * 1000000 %}{{ range(99999) | map('replace', '0', s) | join }}
{% set l = range(99999) | list %}{% for i in l %}{% if -1 in l %}{% endif %}{% endfor %}
{% set l = range(99999) | list %}{% for i in l %}{% set x = l[1:] %}{% endfor %}
{% set l = range(99999) | list %}{% for i in l %}{{ l | sort | length }}{% endfor %}
{{ range(99999) | map('string') | map('list') | sum(start=[]) | length }}
{% for i in range(9999) %}{% set x %}{{ 'a' * 100000 }}{% endset %}{% endfor %}
{{ ('a b ' * 1000000).split() | length }}
{{ ('a' * 4000000) | slice(2) | list | length }}
{{ ('a' * 4000000) | sort | length }}
{{ '-'.join('a' * 4000000) | length }}
{% for x in 'a' * 400000 %}{{ messages | tojson }}{% endfor %}
""".strip().splitlines()


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {}, "<image>")


@pytest.mark.parametrize("source", TOO_MUCH)
def test_what_asks_for_too_much(source: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BundleError, match="asks for more than templates may: it ") as caught:
        template(source).render("Hi", 1)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


@pytest.mark.parametrize(
    "source",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% block a %}{{ self.a() }}{% endblock %}",
    ],
)
def test_recursion_without_end(source: str) -> None:
    with pytest.raises(BundleError, match="recursion"):
        template(source).render("Hi", 1)


@pytest.mark.parametrize(
    "source",
    [
        "{{ [-1000000000] | map('step()') | list }}",
        "{{ (1).to_bytes(9, 'big') }}",
        "{{ 'a'.encode() }}",
        "{{ 'a'.translate({97: 'b'}) }}",
    ],
)
def test_methods_that_no_template_needs(source: str) -> None:
    with pytest.raises(BundleError, match="does what templates may not"):
        template(source).render("Hi", 0)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ a }}" * 20_000, "more than 20000 parts"),
        ("x" * 300_000, "longer than 200000 characters"),
        ("{{ " + "a < " * 20_000 + "a }}", "more than 20000 parts"),
        ("{% if a %}" * 20_000, ""),
        ("{{ " + "(" * 20_000, ""),
        ("{{ x | xmlattr }}", "No filter named 'xmlattr'"),
    ],
)
def test_templates_too_large_to_compile(source: str, reason: str) -> None:
    with pytest.raises(BundleError, match=f"is not valid: .*{reason}") as caught:
        template(source)
    assert len(str(caught.value)) < 500


def test_what_a_template_may_do_grows_with_what_it_is_given() -> None:
    source = "{% for m in messages %}{{ (m.content[0].text + ' ') | trim }}{% endfor %}"
    prompt = "long " * 1_000_000
    assert template(source).render(prompt, 0) == prompt.strip()


@pytest.mark.parametrize(
    ("source", "made"),
    [
        ("{{ 'a' * -5 }}{{ 'ab' * 2 }}{{ [1] * 2 }}", "abab[1, 1]"),
        ("{{ 3 ** 4 }} {{ 2 ** -1 }} {{ 7 // 2 }} {{ 7 % 4 }}", "81 0.5 3 3"),
        ("{{ '%05.1f|%s|%%' % (2.25, 'x') }}", "002.2|x|%"),
        ("{{ '{:>5}|{a[0]}'.format('x', a=[1]) }}", "    x|1"),
        ("{{ 'abc'[1:] }}{{ [1, 2][:1] }}", "bc[1]"),
        ("{{ 'a' ~ 1 ~ none ~ [2] ~ nothing }}", "a1None[2]"),
        (
            "{% for i in range(3) %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}",
            "1/3False 2/3False 3/3True ",
        ),
        ("{% for i in range(5) if i is odd %}{{ i }}{{ loop.length }}{% endfor %}", "1232"),
        ("{% for i in [3, 1] | map('string') %}{{ loop.last }}{{ i }}{% endfor %}", "False3True1"),
        (
            "{{ [3, 1] | sort }}{{ {'b': 1} | items | list }}{{ {'k': 2} | dictsort }}",
            "[1, 3][('b', 1)][('k', 2)]",
        ),
        ("{{ 1 < 2 <= 2 }}{{ 'a' in 'abc' }}{{ 'z' not in ['a'] }}", "TrueTrueTrue"),
        ("{{ dict(a=1) }}{{ dict.fromkeys('a') }}{{ namespace(x=1).x }}", "{'a': 1}{'a': None}1"),
        ("{% set c = cycler(1, 2) %}{{ c.next() }}{{ c.next() }}{{ c.next() }}", "121"),
        ("{{ [[1], [2, 3]] | sum(start=[]) }}{{ [1, 2] | join('-') }}", "[1, 2, 3]1-2"),
        (
            "{% for g in messages[0].content | groupby('type') %}{{ g.grouper }}{{ g.list | length }}"
            "{% endfor %}",
            "text1",
        ),
        ("{{ 'a-b'.split('-') | last }}{{ ' x '.strip() }}{{ 'a'.join(['1', '2']) }}", "bx1a2"),
    ],
)
def test_what_is_counted_stays_what_it_is(source: str, made: str) -> None:
    assert template(source).render("Hi", 0) == made
