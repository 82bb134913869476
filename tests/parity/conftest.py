"""What parity tests have in common."""

from __future__ import annotations

from collections.abc import Sequence

import pytest


@pytest.fixture
def asked(request: pytest.FixtureRequest) -> Sequence[Sequence[int]]:
    """The prompts (numbers of ROWS) that the torch reference answers at each of four ratios.

    It takes most of a test's time. Two with --whole, which has every model with every recipe: each
    prompt at two ratios. Else one, each prompt once. The batch has all prompts anyway.
    """
    if request.config.getoption("--whole"):
        return [(0, 1), (1, 2), (2, 3), (3, 0)]
    return [(0,), (1,), (2,), (3,)]
