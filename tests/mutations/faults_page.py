"""Write docs/notes/mutations.md, the list of faults, from faults.py.

python tests/mutations/faults_page.py
"""

from __future__ import annotations

from pathlib import Path

from faults import FAULTS

PAGE = Path(__file__).parents[2] / "docs/notes/mutations.md"
HEAD = """# Faults put into the product

Each is put into a copy of the package, and the test beside it must fail there by a comparison, not
by a crash. A normal run of the tests does it for two of them and checks that all still fit the
source. All of them:

    pytest tests/mutations --whole

Written by `python tests/mutations/faults_page.py` from `tests/mutations/faults.py`.

| fault | file | seen by |
| --- | --- | --- |
"""


def page() -> str:
    rows = (f"| {name} | `{fault.file}` | `{fault.test}` |\n" for name, fault in FAULTS.items())
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page())
