"""lvlm-export with a profile from a file."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from settings import ASSETS

from lvlm.export.budgets.prefix_profiles import (
    DataId,
    LayerSpread,
    ModelId,
    PrefixProfile,
    RecipeId,
    model_hash,
)
from lvlm.export.checkpoint.checkpoint import Checkpoint
from lvlm.export.export_cli import main
from lvlm.runtime.policies.shares import ProfileRow


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(capfd, main)


def profile(folder: Path, layers: int) -> PrefixProfile:
    row = ProfileRow(0.5, tuple([0.4, 0.6] * (layers // 2)))
    spread = LayerSpread((0.0,) * layers, (row.fractions,))
    model = ModelId("a", "b", model_hash(Checkpoint(folder, "a", None)))
    data, recipe = DataId("", 1), RecipeId("none", {})
    return PrefixProfile("prefixkv", 1, 0.5, (row,), spread, layers, model, data, recipe, {})


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"layers": 8}, (), "the profile is for 8 layers, this model has 6"),
        ({"model": ModelId("other", "b", "0")}, (), "made for another checkpoint (other, b)"),
        ({"schema": 9}, (), "has schema 9, this version reads 1"),
        ({}, ("kv_keep=0.2",), "profile and kv_keep are both given"),
    ],
)
def test_a_profile_that_does_not_fit(
    change: dict[str, Any],
    settings: tuple[str, ...],
    message: str,
    tmp_path: Path,
    run: Run,
) -> None:
    path = tmp_path / "profile.json"
    made = profile(ASSETS / "digits-llava", change.get("layers", 6))
    dataclasses.replace(made, **change).write(path)
    given = (f"profile={path}", *settings)
    sets = [x for setting in given for x in ("--set", setting)]
    arguments = ("-m", ASSETS / "digits-llava", "-r", "prefixkv", *sets, "-o", tmp_path / "out")
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_profile_file_decides_the_capacities(tmp_path: Path, run: Run) -> None:
    """Every layer its share of the longest sequence, and one slot more."""
    path = tmp_path / "profile.json"
    profile(ASSETS / "digits-llava", 6).write(path)
    arguments = ("-m", ASSETS / "digits-llava", "-r", "prefixkv", "--set", f"profile={path}")
    code, out, _ = run(*arguments, "-o", tmp_path / "out", "--dry-run", "--json")
    assert code == 0
    longest = 2048 + 144
    shares = [math.ceil(longest * f) + 1 for f in [0.4, 0.6] * 3]
    data = json.loads(out)
    assert data["capacity"]["per_layer"] == shares
    assert data["recipe"]["parameters"]["profile"] == "profile.json"  # no path
    assert data["recipe"]["parameters"]["kv_keep"] == 0.5
