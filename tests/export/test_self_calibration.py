"""An export that measures its profile itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from settings import ASSETS

from lvlm.core.discovery import discover
from lvlm.core.progress import Progress
from lvlm.export import self_calibration
from lvlm.export.budgets.prefix_profiles import (
    DataId,
    LayerSpread,
    ModelId,
    PrefixProfile,
    RecipeId,
)
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.recipes.recipe import parse_settings
from lvlm.runtime.policies.shares import ProfileRow


def test_the_cache_is_counted_in_its_own_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 of an fp32 bundle: half of what fp32 takes."""
    row = ProfileRow(0.5, (0.5,) * 6)
    made = PrefixProfile(
        *("prefixkv", 1, 0.5, (row,), LayerSpread((0.0,) * 6, (row.fractions,)), 6),
        *(ModelId("a", "b", "0"), DataId("", 1), RecipeId("none", {}), {}),
    )
    monkeypatch.setattr(self_calibration, "calibrate", lambda *_, **__: made)
    recipe = parse_settings(discover("lvlm.export.recipes", "RECIPE")["prefixkv"], [])

    def cache_bytes(**options: Any) -> int:
        given = ExportOptions(
            str(ASSETS / "digits-llava"),
            recipe,
            Path("out"),
            dtype="fp32",
            validate=False,
            **options,
        )
        ready = make_plan(given)
        plan = self_calibration.with_profile(ready, ready.checkpoint, Progress(0, quiet=True))
        assert plan.profile is made
        return plan.cache.bytes

    assert cache_bytes() == 2 * cache_bytes(cache="fp16")
