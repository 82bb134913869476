"""Docstrings of modules, classes and functions: the first word is the thing, or what is done."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "runtime", "export", "plugins_trt", "calibration", "scripts")
# They begin a sentence about something that has no name in it
WORDS = {
    *("What", "How", "Which", "Whether", "Does", "Do", "As", "When", "Where", "Who", "Whose"),
    *("Why", "If", "Is", "Are", "Of"),
}
DESCRIBED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def files(*suffixes: str) -> Iterator[Path]:
    """Product files that end so."""
    for folder in FOLDERS:
        found = sorted((ROOT / folder).rglob("*"))
        yield from (path for path in found if path.suffix in suffixes)


def nameless(source: str) -> list[str]:
    """Names of what a module describes by a sentence that begins with one of the words."""
    described = [node for node in ast.walk(ast.parse(source)) if isinstance(node, DESCRIBED)]
    texts = [(getattr(node, "name", "module"), ast.get_docstring(node)) for node in described]
    return [name for name, text in texts if text and text.split()[0] in WORDS]


def test_modules_classes_and_functions_say_what_they_are() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): nameless(path.read_text(encoding="utf-8"))
        for path in files(".py")
    }
    assert found
    assert {path: names for path, names in found.items() if names} == {}


def test_what_has_no_name_is_seen() -> None:
    method = 'class A:\n    """A thing."""\n    def f(self):\n        """How many."""\n'
    assert nameless('"""What it is."""\n' + method) == ["module", "f"]


def test_the_head_of_a_native_file_says_what_it_is() -> None:
    heads = {
        path.relative_to(ROOT).as_posix(): re.match(r"(?:#.*\s+)*//+\s*(\w+)", path.read_text())
        for path in files(".h", ".cpp")
    }
    assert any(heads.values())  # a file whose header has said it may have none
    assert [path for path, head in heads.items() if head and head[1] in WORDS] == []
