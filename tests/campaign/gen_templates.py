"""Chat templates: random programs, damaged ones, and such that ask for time or memory."""

from __future__ import annotations

import json
import random
from pathlib import Path

from campaign.case import Base, Case
from campaign.gen_images import model_of
from campaign.gen_manifests import command
from campaign.mutate import linked, mutate_bytes, replace

WEIGHT = 12
WARM = ("lvlm.runtime.model",)
ATOMS = (
    *("messages", "message", "'a'", "1", "10**9", "10**10", "[]", "{}", "none", "loop", "self"),
    *("bos_token", "eos_token", "message['content']", "messages[0].role", "range(9)", "x"),
    *("range(10**9)", "range(10**5)", "lipsum", "cycler", "namespace()", "joiner()", "dict(a=1)"),
    *("''.__class__", "messages.__class__.__mro__", "''.join", "'%s'", "'{}'.format", "undefined"),
    *("add_generation_prompt", "tools", "strftime_now", "raise_exception('no')", "2**31", "-1"),
)
FILTERS = (
    *("upper", "trim", "length", "list", "tojson", "join(',')", "first", "last", "sort", "unique"),
    *("map('upper')", "batch(3)", "replace('a','bb')", "center(10**8)", "indent(10**6)", "reverse"),
    *(
        "items",
        "sum",
        "string",
        "int",
        "abs",
        "random",
        "wordwrap(1)",
        "format(1)",
        "selectattr('a')",
    ),
    *("groupby('a')", "truncate(3)", "urlize", "pprint", "xmlattr", "slice(10**7)", "round(99)"),
)
OPERATORS = ("*", "+", "~", "**", "%", "//", "-", "in", "and", "==", "<", "or", "is", "/")


def make(rng: random.Random, folder: Path, base: Base) -> Case:
    usual = (base.checkpoint / "chat_template.jinja").read_text()
    if rng.random() < 0.3:
        source = mutate_bytes(rng, usual.encode()).decode(errors="replace")
    else:
        source = _block(rng, 3)
    if rng.random() < 0.5:
        return Case("generate", (source,), lambda: _ask(base, source))
    bundle = linked(base.bundle, folder / "bundle")
    data = json.loads((bundle / "lvlm.json").read_text())
    data["chat_template"] = source
    replace(bundle / "lvlm.json", json.dumps(data).encode())
    return command(rng, bundle, base)


def _ask(base: Base, source: str) -> None:
    model_of(base.bundle).generate("What is it?", chat_template=source, max_new_tokens=1)


def _expression(rng: random.Random, depth: int) -> str:
    if depth < 1 or rng.random() < 0.3:
        return rng.choice(ATOMS)
    a, b = _expression(rng, depth - 1), _expression(rng, depth - 1)
    match rng.randrange(6):
        case 0 | 1:
            return f"({a} {rng.choice(OPERATORS)} {b})"
        case 2:
            return f"({a} | {rng.choice(FILTERS)})"
        case 3:
            return f"{a}[{b}]"
        case 4:
            return f"({a} if {b} else 'z')"
        case _:
            return f"[{a}, {b}]"


def _block(rng: random.Random, depth: int) -> str:
    parts = []
    for _ in range(rng.randint(1, 3)):
        inside = _block(rng, depth - 1) if depth else "y"
        value = _expression(rng, 3)
        if rng.random() < 0.02:
            parts.append(rng.choice(("{% include 'x' %}", "{# " + "c" * 50)))
        parts.append(
            rng.choice(
                (
                    f"{{{{ {value} }}}}",
                    f"{{% for message in {value} %}}{inside}{{% endfor %}}",
                    f"{{% for x in range(10**5) %}}{inside}{{% endfor %}}",
                    f"{{% if {value} %}}{inside}{{% else %}}n{{% endif %}}",
                    f"{{% set x = {value} %}}",
                    f"{{% macro m(a) %}}{inside}{{{{ m(a) }}}}{{% endmacro %}}{{{{ m({value}) }}}}",
                    "{%- for message in messages -%}{{ message['content'] }}{%- endfor -%}",
                    f"{{% set n = namespace(a={value}) %}}{{% set n.a = n.a ~ n.a %}}{{{{ n.a }}}}",
                    f"{{% filter {rng.choice(FILTERS)} %}}{inside}{{% endfilter %}}",
                )
            )
        )
    return "".join(parts)
