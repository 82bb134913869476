"""Write docs/cli.md, the reference of every command, from the commands' own parsers."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

from lvlm.core.console import Parser
from lvlm.main import run_verb
from lvlm.verbs import MODULES

PAGE = Path(__file__).parents[1] / "docs/cli.md"
PARTS = {
    "build": ("plugins", "engine", "cpu", "triton"),
    "compare": ("checkpoint", "devices", "layers"),
}  # commands within a command
HEAD = """# Command line

Every command; `lvlm VERB` is the same as `lvlm-VERB`. Each takes `-h` and `--version`. How commands
end: [bundles.md](bundles.md). Made by `python scripts/cli_reference.py`; do not edit.
"""


def reference() -> str:
    """The page."""
    verbs = [part for verb in sorted(MODULES) for part in _verbs(verb)]
    return "\n".join([HEAD, *(line for verb in verbs for line in _section(verb))])


def _verbs(verb: str) -> Sequence[tuple[str, ...]]:
    return [(verb, part) for part in PARTS.get(verb, ())] or [(verb,)]


def _section(verb: tuple[str, ...]) -> Iterator[str]:
    parser = _parser(verb)
    yield f"## lvlm-{' '.join(verb)}"
    yield ""
    yield _text(parser.description or "")
    yield ""
    examples = re.sub(r"^examples?: ", "", " ".join((parser.epilog or "").split()))
    yield from (f"    {command}" for command in filter(None, examples.split(" · ")))
    yield ""
    yield "| | |"
    yield "| --- | --- |"
    for action in parser._actions:
        if action.help != argparse.SUPPRESS and not {"--help", "--version"} & {
            *action.option_strings
        }:
            yield f"| {_names(action)} | {_text(_help(parser, action))} |"
    yield ""


def _parser(verb: tuple[str, ...]) -> argparse.ArgumentParser:
    """The parser that the command would show the help of."""
    found: list[argparse.ArgumentParser] = []
    with (
        patch.object(Parser, "print_help", lambda self, *_: found.append(self)),
        contextlib.suppress(SystemExit),
    ):
        run_verb(verb[0], [*verb[1:], "--help"])
    return found[0]


def _names(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else _value(action).replace("|", "\\|")
    if action.nargs in ("*", "+"):
        value += " …"
    return ", ".join(f"`{f'{flag} {value}'.strip()}`" for flag in action.option_strings or [""])


def _value(action: argparse.Action) -> str:
    if action.choices is not None and action.metavar is None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    name = action.metavar or action.dest.upper()
    return name if isinstance(name, str) else " ".join(name)


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def _text(text: str) -> str:
    """The text in one line, with nothing that Markdown would take for its own."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
