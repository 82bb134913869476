"""Packages of the distribution: every folder with Python files, read from the tree at build time.

The root's folders are packages within ``lvlm``. An editable install puts a folder of links in that
shape on Python's path, so that type checkers and editors find what Python finds (CONTRIBUTING.md).
"""

import shutil
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent
LINKS = ROOT / ".editable"
# A package of its own each; a folder within a folder goes to the longest that it begins with.
HOMES = {
    "src/lvlm": "lvlm",
    "assets": "lvlm.assets",
    "runtime": "lvlm.runtime",
    "export": "lvlm.export",
    "calibration": "lvlm.calibration",
    "calibration/bench": "lvlm.bench",
    "plugins_trt": "lvlm.plugins_trt",
}


def packages() -> dict[str, str]:
    """Package -> folder."""
    found = {name: folder for folder, name in HOMES.items()}
    for home, name in HOMES.items():
        for file in sorted((ROOT / home).glob("*/**/*.py")):
            folder = file.parent.relative_to(ROOT)
            if folder.as_posix() not in HOMES and not _elsewhere(folder, home):
                found[_name(name, folder.relative_to(home))] = folder.as_posix()
        for file in sorted((ROOT / home).glob("*/**/*.*")):  # folders of data are packages, too
            folder = file.parent.relative_to(ROOT)
            below = folder.relative_to(home)
            known = folder.as_posix() in found.values() or _elsewhere(folder, home)
            if not known and all(p.isidentifier() and p != "__pycache__" for p in below.parts):
                found[_name(name, below)] = folder.as_posix()
    return found


def _name(home: str, below: Path) -> str:
    return ".".join((home, *below.parts))


def _elsewhere(folder: Path, home: str) -> bool:
    """A longer home has it."""
    return any(folder.is_relative_to(other) for other in HOMES if len(other) > len(home))


class Editable(editable_wheel):
    """``pip install -e .``: the folder of links is on Python's path, by a plain .pth file."""

    def finalize_options(self) -> None:
        link_packages()
        self.distribution.package_dir = {"": LINKS.name}
        super().finalize_options()


class Links(Command):
    """``python setup.py links``: the folder of links alone (scripts/with_package.sh)."""

    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        link_packages()


def link_packages() -> None:
    """``.editable/lvlm``: each home is one link; its entries are, where another home shares it."""
    shutil.rmtree(LINKS, ignore_errors=True)
    for home, name in HOMES.items():
        place = LINKS.joinpath(*name.split("."))
        inside = any(other.startswith(f"{name}.") for other in HOMES.values())
        around = any(other.startswith(f"{home}/") for other in HOMES)
        entries = sorted((ROOT / home).iterdir()) if inside or around else [ROOT / home]
        for entry in entries:
            link = place / entry.name if inside or around else place
            if entry.relative_to(ROOT).as_posix() in HOMES and entry != ROOT / home:
                continue  # a package of its own
            if entry.name != "__pycache__":
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(entry)


FOUND = packages()
setup(
    packages=list(FOUND), package_dir=FOUND, cmdclass={"editable_wheel": Editable, "links": Links}
)
