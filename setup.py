"""Which packages there are: every folder with Python files, read from the tree at build time."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
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
                parts = folder.relative_to(home).parts
                found[".".join((name, *parts))] = folder.as_posix()
    return found


def _elsewhere(folder: Path, home: str) -> bool:
    """A longer home has it."""
    return any(folder.is_relative_to(other) for other in HOMES if len(other) > len(home))


FOUND = packages()
setup(packages=list(FOUND), package_dir=FOUND)
