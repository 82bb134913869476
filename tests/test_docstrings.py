"""Docstrings of modules: the first word is the thing, or the verb of what is done."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "runtime", "export", "plugins_trt", "calibration", "scripts")
# They begin a sentence about something that has no name in it
WORDS = {
    *("What", "How", "Which", "Whether", "Does", "Do", "As", "When", "Where", "Who", "Whose"),
    *("Why", "If", "Is", "Are", "Of"),
}


def test_a_module_says_what_it_is() -> None:
    begins = {}
    for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        begins[path.relative_to(ROOT).as_posix()] = text.split()[0] if text else ""
    assert begins
    assert {path: word for path, word in begins.items() if word in WORDS} == {}
