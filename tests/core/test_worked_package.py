"""The package of docs/extending.md, as it stands there, installed: its recipe and its family."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from forked import run_forked

PAGE = Path(__file__).parents[2] / "docs/extending.md"
BLOCK = re.compile(r"^```\w+\n# (\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

# As a process that was started with the package installed
CODE = """
import runpy, sys
from lvlm.core import discovery
from lvlm.export.export_cli import main
discovery.discover.cache_clear()
discovery.added.cache_clear()
runpy.run_path("try_family.py")
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of the page, and what pip leaves of an installed package."""
    files = dict(BLOCK.findall(PAGE.read_text()))
    assert set(files) == {
        *("pyproject.toml", "try_family.py"),
        *("my_methods/recipe.py", "my_methods/family.py"),
    }
    for name, text in (files | {"my_methods/__init__.py": ""}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    project = tomllib.loads(files["pyproject.toml"])["project"]
    about = tmp_path / "my_methods.dist-info"
    about.mkdir()
    about.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    about.joinpath("entry_points.txt").write_text(
        "\n".join(
            f"[{group}]\n" + "\n".join(f"{name} = {module}" for name, module in points.items())
            for group, points in project["entry-points"].items()
        )
    )
    return tmp_path


def run(folder: Path, *command: str) -> str:
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_recipe_is_there(folder: Path) -> None:
    assert "--set look=16" in run(folder, "-m", "lvlm", "export", "--help-recipe", "last-look")


@pytest.mark.slow
def test_its_family_is_exported_with_its_recipe(folder: Path, pytestconfig: pytest.Config) -> None:
    """Compared with transformers and the recipe's torch reference; a normal run only plans it."""
    export = ["-m", "tiny-vip", "-r", "lightvlm", "--set", "kv=last-look", "-o", "vip"]
    whole = pytestconfig.getoption("--whole")
    if not whole:
        done = run_forked(CODE, *export, "--dry-run", folder=folder)
        assert done.returncode == 0, done.stderr
        assert "vip-llava" in done.stdout
        return
    run(folder, "-c", CODE, *export)
    assert (folder / "vip/lvlm.json").exists()
