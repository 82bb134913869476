"""A prompt in pieces beside the same prompt as a whole, over a cache of lower precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from settings import ASSETS

from lvlm.core.discovery import discover
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.recipes.recipe import parse_settings
from lvlm.export.verify.against_reference import pieces_checks
from lvlm.export.verify.graph_forms import CANONICAL, GraphForm
from lvlm.export.verify.run import Run


@pytest.mark.parametrize(
    ("recipe", "cache", "limit"),
    [("none", "int8", 1e-1), ("none", None, 1e-3), ("elastic-cache", "int8", 2e-2)],
)
def test_what_was_rounded_may_be_further_apart(
    recipe: str, cache: str | None, limit: float
) -> None:
    """Where prefill, which the pieces are compared with, reads nothing that was rounded."""
    parsed = parse_settings(discover("lvlm.export.recipes", "RECIPE")[recipe], [])
    given = ExportOptions(
        str(ASSETS / "digits-llava"), parsed, Path("out"), dtype="fp32", cache=cache
    )
    whole = np.linspace(-1, 1, 9)
    form = GraphForm(CANONICAL, {"extend": "extend.onnx"})
    for apart, passes in [(0.9 * limit, True), (1.1 * limit, False)]:
        run = Run(np.zeros((0, 4)), logits=[whole], extended=[whole, whole + apart])
        (check,) = pieces_checks(make_plan(given), form, run)
        assert (check.limit, check.passed) == (limit, passes)
