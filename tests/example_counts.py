"""How much a test does in a normal run: a part of what it does with --whole.

conftest.py says which of the two a run is before tests are imported.
"""

from __future__ import annotations

import os

VARIABLE = "LVLM_TESTS_WHOLE"  # a variable, so that every process of a run knows
LEAST = 5


def whole() -> bool:
    """Whether this run has every combination."""
    return bool(os.environ.get(VARIABLE))


def examples(number: int) -> int:
    """The ``max_examples`` of a test with generated inputs that draws ``number`` with --whole."""
    return number if whole() else max(min(number, LEAST), number // 3)
