"""Docstrings of what ``lvlm`` names: each parameter under Args, what is given under Returns."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import lvlm

SECTION = re.compile(r"^(Args|Returns|Yields|Raises):$", re.MULTILINE)
UNNAMED = re.compile(r"(What|How|Which|Whether|When|Where|Does|As|Of)\b")
NAMES = re.compile(r"^ {4}(\w+(?:, \w+)*): \S", re.MULTILINE)


def public() -> Iterator[tuple[str, Any]]:
    """Every public name, and every public method, property and class method of the classes."""
    for name in lvlm.__all__:
        thing = getattr(lvlm, name)
        yield name, thing
        if not inspect.isclass(thing):
            continue
        for attribute, member in inspect.getmembers_static(thing):
            home = next(cls for cls in thing.__mro__ if attribute in vars(cls))
            ours = home.__module__.startswith("lvlm.")
            callable_ = callable(getattr(thing, attribute)) or isinstance(member, property)
            if ours and callable_ and not attribute.startswith("_"):
                yield f"{name}.{attribute}", member


THINGS = dict(public())


def sections(doc: str) -> dict[str, str]:
    """Text of each section, up to the first line that is not indented."""
    parts = SECTION.split(doc)
    rest = [re.split(r"^\S", text, maxsplit=1, flags=re.MULTILINE)[0] for text in parts[2::2]]
    return dict(zip(parts[1::2], rest, strict=True))


def missing(thing: Any) -> str | None:
    """What a docstring lacks, if anything."""
    function = getattr(thing, "__func__", thing)
    doc = vars(thing).get("__doc__") if inspect.isclass(thing) else function.__doc__
    if not doc:
        return "a docstring"
    if UNNAMED.match(doc):
        return "a beginning that names the thing"
    if isinstance(thing, property):
        return None
    if inspect.isclass(thing):  # one that adds no parameters has those of its base
        maker = "__new__" if issubclass(thing, tuple) else "__init__"
        owner = next(cls for cls in thing.__mro__ if maker in vars(cls))
        function, doc = vars(owner)[maker], owner.__doc__ or ""
    found = sections(inspect.cleandoc(doc))
    named = {name for names in NAMES.findall(found.get("Args", "")) for name in names.split(", ")}
    wanted = [name for name in inspect.signature(function).parameters
              if name not in ("self", "cls", "_cls")]  # fmt: skip
    for name in wanted:
        if name not in named:
            return f"{name} under Args"
    if unknown := named - set(wanted):
        return f"no {min(unknown)} under Args, which is no parameter"
    returns = inspect.signature(function).return_annotation not in (None, "None")
    if returns and not inspect.isclass(thing) and not {"Returns", "Yields"} & set(found):
        return "Returns"
    return None


@pytest.mark.parametrize("name", THINGS)
def test_a_public_name_says_what_it_takes_and_gives(name: str) -> None:
    assert missing(THINGS[name]) is None, (
        f"the docstring of lvlm.{name} lacks {missing(THINGS[name])}"
    )


def undocumented() -> int:
    return 0


def vague() -> None:
    """What is drawn."""


def silent(width: int) -> None:
    """Draw a line."""


def half(width: int) -> None:
    """Draw a line.

    Args:
        width: in pixels.
        height: of old.
    """


def mute(width: int) -> int:
    """Draw a line.

    Args:
        width: in pixels.

    It is drawn.
    """
    return width


def whole(width: int, *given: int) -> int:
    """Draw a line.

    Args:
        width, given: in pixels.

    Returns:
        Its area.
    """
    return width * len(given)


@pytest.mark.parametrize(
    ("thing", "lacks"),
    [
        (undocumented, "a docstring"),
        (vague, "a beginning that names the thing"),
        (silent, "width under Args"),
        (half, "no height under Args, which is no parameter"),
        (mute, "Returns"),
        (whole, None),
    ],
)
def test_what_is_missing_is_seen(thing: Any, lacks: str | None) -> None:
    assert missing(thing) == lacks


def test_methods_are_among_what_is_looked_at() -> None:
    seen = {"Model.generate", "Engine.count_tokens", "Video.of", "Memory.total", "AsyncHandle.wait"}
    assert seen <= set(THINGS)
