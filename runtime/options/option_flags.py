"""Command line flags of the options of a call, made from GenerationOptions."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from lvlm.core.errors import ParameterError
from lvlm.core.opening import at_once
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.options.option_kinds import Option

LONGEST = 1_000_001  # characters that are read of a file: more than any option may have
FILES = ("chat_template", "grammar")  # options whose flag names a file, and
JSON = {"schema": "{", "tools": "["}  # a file or JSON, which begins so


def add_option_flags(parser: argparse.ArgumentParser, names: Iterable[str] = ()) -> None:
    """A flag for each option (of those ``names``, where there are any); not given it is None."""
    wanted = set(names)
    for each in fields(GenerationOptions):
        if wanted and each.name not in wanted:
            continue
        option: Option = each.metadata["option"]
        flag = "--" + each.name.replace("_", "-")
        default = f" (default {each.default:g})" if isinstance(each.default, int | float) else ""
        settings: dict[str, Any] = {"metavar": option.metavar, "help": option.help + default}
        if option.flag == "switch":
            parser.add_argument(flag, action="store_true", default=None, help=option.help)
        elif option.flag == "template":
            group = parser.add_mutually_exclusive_group()
            group.add_argument(flag, type=Path, metavar=option.metavar, help=option.help)
            group.add_argument(
                "--no-" + flag.removeprefix("--"),
                action="store_true",
                help="the prompt as it stands, with its own image placeholders",
            )
        elif option.flag == "texts":
            parser.add_argument(flag, action="append", **settings)
        else:
            parser.add_argument(flag, type=_KINDS[option.flag], **settings)


def given_options(args: argparse.Namespace) -> GenerationOptions:
    """Options given by flags; all else as GenerationOptions has it.

    Raises ParameterError.
    """
    names = [each.name for each in fields(GenerationOptions)]
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    for name in FILES:
        if (path := given.get(name)) is not None:
            given[name] = read_text(name, path)
    for name, first in JSON.items():
        if (text := given.get(name)) is not None and not text.lstrip().startswith(first):
            given[name] = read_text(name, Path(text))
    if getattr(args, "no_chat_template", False):
        given["chat_template"] = False
    return GenerationOptions(**given)


def read_text(name: str, path: Path) -> str:
    """The text of the file that the flag of an option names. Raises ParameterError."""
    flag = "--" + name.replace("_", "-")
    try:
        with open(path, encoding="utf-8", opener=at_once) as file:
            text = file.read(LONGEST)
    except OSError as error:
        reason = error.strerror or error
        raise ParameterError(f"{flag} {path} cannot be read: {reason}") from None
    except UnicodeDecodeError:
        raise ParameterError(f"{flag} {path} is not text in UTF-8") from None
    if not text:
        raise ParameterError(f"{flag} {path} is empty")
    return text


def _ratios(text: str) -> float | tuple[float, ...]:
    try:
        ratios = tuple(float(part) for part in text.split(","))
    except ValueError:
        wanted = "is not a number or a list like 0.7,0.5,0.3"
        raise argparse.ArgumentTypeError(f"'{text}' {wanted}") from None
    return ratios[0] if len(ratios) == 1 else ratios


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        wanted = "is not a token id or a list like 2,32000"
        raise argparse.ArgumentTypeError(f"'{text}' {wanted}") from None


def _biases(text: str) -> dict[int, float]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {int(token): float(bias) for token, bias in pairs}
    except ValueError:
        wanted = "is not a list of token ids and numbers like 5=-100,7=2.5"
        raise argparse.ArgumentTypeError(f"'{text}' {wanted}") from None


_KINDS: dict[str, Callable[[str], Any]] = {
    "integer": int,
    "number": float,
    "text": str,
    "schema": str,
    "tools": str,
    "file": Path,
    "ratios": _ratios,
    "ids": _ids,
    "biases": _biases,
}
