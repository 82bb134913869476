"""``lvlm VERB …``: the same as ``lvlm-VERB …``, for every command that is installed."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path

from lvlm.runtime.console import run_main
from lvlm.runtime.discovery import nearest
from lvlm.runtime.errors import LvlmError, ParameterError
from lvlm.runtime.version import DISTRIBUTION, version

PREFIX = "lvlm-"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_main("lvlm", lambda: _dispatch(arguments))


def _dispatch(arguments: list[str]) -> int:
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise LvlmError(f"{DISTRIBUTION} is not installed; pip install -e .") from None
    verbs = {
        point.name.removeprefix(PREFIX): point
        for point in distribution.entry_points.select(group="console_scripts")
        if point.name.startswith(PREFIX)
    }
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(_help(verbs))
    elif verb == "--version":
        print(f"{DISTRIBUTION} {version()}")
    elif verb not in verbs:
        raise nearest("verb", verb, verbs)
    else:
        try:
            command = verbs[verb].load()
        except (ImportError, AttributeError) as error:
            raise ParameterError(
                f"{PREFIX}{verb} cannot start: {error}; install {DISTRIBUTION} again"
            ) from None
        return int(command(arguments[1:]))
    return 0


def _help(verbs: dict[str, metadata.EntryPoint]) -> str:
    width = max(map(len, verbs), default=0)
    lines = [
        "usage: lvlm VERB [-h] …",
        "       lvlm --version",
        "",
        "Vision-language models with token merging and cache compression, on ONNX Runtime.",
        "",
        "verbs (each is also a command, lvlm-VERB):",
        *(f"  {verb:{width}}  {_summary(point)}" for verb, point in sorted(verbs.items())),
    ]
    return "\n".join(lines)


def _summary(point: metadata.EntryPoint) -> str:
    """The first line of the command's module, read without importing what the module needs."""
    try:
        spec = util.find_spec(point.module)
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        return f"cannot start: there is no module {point.module}; install {DISTRIBUTION} again"
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].removeprefix(f"``{point.name}``: ").removesuffix(".")
