"""``lvlm VERB …``: the same as ``lvlm-VERB …``, for every command."""

from __future__ import annotations

import ast
import importlib
import platform
import sys
from collections.abc import Sequence
from importlib import util
from pathlib import Path

from lvlm.core.console import run_main
from lvlm.core.discovery import nearest
from lvlm.core.errors import ParameterError
from lvlm.core.version import DISTRIBUTION, version
from lvlm.verbs import MODULES, ON_PYTHON_3_10, PREFIX


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_main("lvlm", lambda: _dispatch(arguments))


def run_verb(verb: str, arguments: Sequence[str]) -> int:
    """The exit status of a command. Raises ParameterError where it cannot start."""
    if sys.version_info < (3, 11) and verb not in ON_PYTHON_3_10:
        there = ", ".join(PREFIX + name for name in sorted(ON_PYTHON_3_10))
        raise ParameterError(
            f"{PREFIX}{verb} needs Python 3.11 or newer, this is {platform.python_version()}; run "
            f"it on a workstation (here there are {there})"
        )
    try:
        command = importlib.import_module(MODULES[verb]).main
    except (ImportError, AttributeError) as error:
        raise ParameterError(
            f"{PREFIX}{verb} cannot start: {error}; install {DISTRIBUTION} again"
        ) from None
    return int(command(arguments))


def _dispatch(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(_help())
    elif verb == "--version":
        print(f"{DISTRIBUTION} {version()}")
    elif verb not in MODULES:
        raise nearest("verb", verb, MODULES)
    else:
        return run_verb(verb, arguments[1:])
    return 0


def _help() -> str:
    width = max(map(len, MODULES))
    lines = [
        "usage: lvlm VERB [-h] …",
        "       lvlm --version",
        "",
        "Vision-language models with token merging and cache compression, on ONNX Runtime.",
        "",
        "verbs (each is also a command, lvlm-VERB):",
        *(f"  {verb:{width}}  {_summary(verb)}" for verb in sorted(MODULES)),
    ]
    return "\n".join(lines)


def _summary(verb: str) -> str:
    """The first line of the command's module, read without importing what the module needs."""
    module = MODULES[verb]
    try:
        spec = util.find_spec(module)
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        return f"cannot start: there is no module {module}; install {DISTRIBUTION} again"
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].removeprefix(f"``{PREFIX}{verb}``: ").removesuffix(".")
