"""Names that a reader can rely on: a class or a file is called so once in the product, and a module
says first what it is."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "runtime")
# Files whose names a protocol fixes, and classes that it asks for under one name
FILES = {"__init__", "__main__", "plugin", "kernel", "contract", "function", "samples"}
CLASSES = {"Backend"}
# Folders where a file's name is that of a device, family, recipe or rule: the same in several
FOUND_BY_NAME = {
    *("runtime/backends", "runtime/processors", "runtime/reductions"),
    *("export/families", "export/recipes", "export/targets"),
}
# Of a sentence about something that is not named
WORDS = {
    *("What", "How", "Which", "Whether", "Does", "Do", "As", "When", "Where", "Who", "Whose"),
    *("Why", "If", "Is", "Are", "Of"),
}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of ``FOLDERS``, by its path from the root."""
    paths = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in paths}


def test_a_class_is_defined_once() -> None:
    where = defaultdict(list)
    for path, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name not in CLASSES:
                where[node.name].append(f"{path}:{node.lineno}")
    assert where
    assert not {name: places for name, places in where.items() if len(places) > 1}


def test_a_file_is_called_so_once() -> None:
    where = defaultdict(list)
    for path in map(Path, modules()):
        if path.stem not in FILES and path.parent.as_posix() not in FOUND_BY_NAME:
            where[path.stem].append(path.as_posix())
    assert where
    assert not {name: places for name, places in where.items() if len(places) > 1}


def test_a_module_says_what_it_is() -> None:
    said = {path: ast.get_docstring(tree) for path, tree in modules().items()}
    begins = {path: text.split()[0] for path, text in said.items() if text}
    assert begins
    assert not {path: word for path, word in begins.items() if word in WORDS}
