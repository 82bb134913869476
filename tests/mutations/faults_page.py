"""Write docs/notes/mutations.md, the list of faults, from faults.py.

python tests/mutations/faults_page.py
"""

from __future__ import annotations

from pathlib import Path

from faults import FAULTS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/notes/mutations.md"
HOMES = ("", "src/lvlm", "calibration")  # of what lies at the package's root
HEAD = """# Faults put into the product

Each is put into a copy of the package, and the test beside it must fail there by a comparison, not
by a crash. A normal run of the tests does it for two of them and checks that all still fit the
source. All of them:

    pytest tests/mutations --whole

Written by `python tests/mutations/faults_page.py` from `tests/mutations/faults.py`.

| fault | file | seen by |
| --- | --- | --- |
"""


def home(file: str) -> str:
    """Path in the checkout of a file of the package."""
    return next(str(Path(home, file)) for home in HOMES if (ROOT / home / file).is_file())


def page() -> str:
    rows = (f"| {name} | `{home(f.file)}` | `{f.test}` |\n" for name, f in FAULTS.items())
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page())
