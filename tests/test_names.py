"""A name stands for one thing: the classes and the files of the product and of scripts/."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "runtime", "export", "plugins_trt", "calibration", "scripts")
# Discovery asks each file of a folder for a class of this name (docs/extending.md)
ASKED_FOR = {"Backend"}
# The files of each op's folder
PARTS = {"__init__.py", "contract.py", "function.py", "samples.py", "kernel.py", "plugin.py"}
# A file here is called what users write: a recipe and its rule, a family and its processor
WRITTEN_BY_USERS = {
    ROOT / folder
    for folder in (
        "export/families",
        "export/recipes",
        "export/targets",
        "runtime/backends",
        "runtime/processors",
        "runtime/reductions",
    )
}
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def repeated(named: Iterable[tuple[str, Path]]) -> dict[str, list[str]]:
    """Names that more than one place has, with these places."""
    places: dict[str, list[str]] = defaultdict(list)
    for name, path in named:
        places[name].append(path.relative_to(ROOT).as_posix())
    return {name: found for name, found in places.items() if len(found) > 1}


def test_a_class_name_is_defined_once() -> None:
    classes = (
        (node.name, path)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name not in ASKED_FOR
    )
    assert repeated(classes) == {}


def test_a_file_name_is_there_once() -> None:
    files = ((f.name, f) for f in FILES if f.name not in PARTS and f.parent not in WRITTEN_BY_USERS)
    assert repeated(files) == {}
