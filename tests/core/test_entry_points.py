"""Methods that live in their author's own package: installed, they are there as ours are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lvlm.core import discovery

RECIPE = """
from dataclasses import dataclass
from typing import ClassVar

from lvlm.export.recipes.recipe import Recipe


@dataclass(frozen=True)
class Theirs(Recipe):
    name: ClassVar[str] = "theirs"
    summary: ClassVar[str] = "a recipe of somebody else"
    source: ClassVar[str] = "-"


RECIPE = Theirs
"""
TARGET = """
import dataclasses

from lvlm.export.targets.ort_cuda import TARGET as OURS

OTHER = dataclasses.replace(OURS, name="their-target", summary="a target of somebody else")
"""
FAMILY = """
class Family:
    name = "their-family"


FAMILY = Family()
"""
BACKEND = """
class Backend:
    name = "their-device"

    def __init__(self, threads=None):
        print("opened with", threads)
"""
PROCESSOR = """
class PROCESSOR:
    name = "their-processor"

    def __init__(self, config):
        print("made of", config)
"""
RULE = """
class RULE:
    name = "their-rule"
"""
POINTS = """
[lvlm.recipes]
theirs = author.recipe
[lvlm.targets]
their-target = author.target:OTHER
[lvlm.families]
their-family = author.family
[lvlm.backends]
their-device = author.backend
[lvlm.processors]
their-processor = author.processor
[lvlm.reductions]
their-rule = author.rule
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with an installed package, as pip leaves one."""
    package, about = tmp_path / "author", tmp_path / "author_of_methods-1.0.dist-info"
    package.mkdir()
    about.mkdir()
    sources = {"recipe": RECIPE, "target": TARGET, "family": FAMILY, "backend": BACKEND}
    sources |= {"processor": PROCESSOR, "rule": RULE, "__init__": ""}
    for name, text in sources.items():
        (package / f"{name}.py").write_text(text)
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: author-of-methods\nVersion: 1.0\n"
    )
    (about / "entry_points.txt").write_text(POINTS)
    return tmp_path


def run(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


def test_recipes_targets_and_devices_are_listed(site: Path) -> None:
    done = run(site, "-m", "lvlm", "export", "--help-recipe", "--list-targets")
    assert done.returncode == 0, done.stderr
    assert "a recipe of somebody else" in done.stdout
    assert "a target of somebody else" in done.stdout.replace("\n", " ")
    done = run(site, "-m", "lvlm", "run", "--help")
    assert "their-device" in done.stdout


def test_what_the_runtime_finds(site: Path) -> None:
    code = """
from lvlm.runtime.backends import open_backend
from lvlm.runtime.processors import load_processor
from lvlm.runtime.reductions import rules
assert rules()["their-rule"].name == "their-rule"
assert open_backend("their-device", threads=1).name == "their-device"
assert load_processor({"name": "their-processor"}).name == "their-processor"
"""
    done = run(site, "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "opened with 1\nmade of {'name': 'their-processor'}\n"


@pytest.mark.slow
def test_families_are_found(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which may have imported ours, some seconds of transformers, already."""
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(discovery, "added", discovery.added.__wrapped__)
    found = discovery.discover.__wrapped__("lvlm.export.families", "FAMILY")
    assert found["their-family"].name == "their-family"
    assert "llava" in found


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("recipe.py", "import no_such_thing", "cannot be loaded (No module named 'no_such_thing')"),
        ("recipe.py", RECIPE.replace("RECIPE =", "OTHER ="), "has no RECIPE"),
        (
            "recipe.py",
            RECIPE.replace('"theirs"', '"snapkv"'),
            "has the name 'snapkv', which is taken",
        ),
    ],
)
def test_one_that_is_wrong_is_one_line(site: Path, file: str, text: str, said: str) -> None:
    (site / "author" / file).write_text(text)
    done = run(site, "-m", "lvlm", "export", "--help-recipe")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert "theirs of author-of-methods (entry point of lvlm.recipes)" in done.stderr
    assert "uninstall it" in done.stderr
