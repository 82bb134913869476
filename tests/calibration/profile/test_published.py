"""PrefixKV's published budgets: evicted fractions, a number per layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from settings import ASSETS

from lvlm.calibration.profile.calibrate_cli import main
from lvlm.export.budgets.prefix_profiles import check_profile, model_hash, read_profile
from lvlm.export.checkpoint.checkpoint import Checkpoint

MODEL = ASSETS / "digits-llava"
FIFTH = [0.0, 0.1, 0.3, 0.2, 0.25, 0.35]  # evicted of each of six layers
HALF = [0.2, 0.4, 0.6, 0.5, 0.6, 0.7]


def run(*argv: object) -> int:
    return main([str(a) for a in argv])


def test_what_is_evicted_becomes_what_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"{name}.json" for name in ("fifth", "half")]
    for file, evicted in zip(files, (FIFTH, HALF), strict=True):
        file.write_text(json.dumps(evicted))
    out = tmp_path / "profile.json"
    assert run("-m", MODEL, "--from-prefixkv", *files, "-o", out, "--keep", 0.75) == 0
    said = capsys.readouterr().err
    assert "50.0% kept, 80.0% kept" in said
    assert "profile=" in said
    profile = read_profile(out)
    check_profile(profile, 6, model_hash(Checkpoint(MODEL, "", None)))
    assert profile.keep == pytest.approx(0.8)
    assert profile.row().fractions == pytest.approx([1.0, 0.9, 0.7, 0.8, 0.75, 0.65])
    assert [row.keep for row in profile.rows] == pytest.approx([0.5, 0.8])
    assert out.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        ("[0.1, 0.2]", [], "is for 2 layers, this model has 6"),
        ("{}", [], "no list of numbers"),
        ("[0.1", [], "holds no budgets of PrefixKV's"),
        ("[0, 0, 0, 0, 0, 1.0]", [], "1.0 is evicted"),
        ("[0, 0, 0, 0, 0, NaN]", [], "nan is evicted"),
        (None, [], "does not exist"),
        (json.dumps(FIFTH), ["--samples", 3], "--samples is for measuring"),
        (json.dumps(FIFTH), ["-r", "lightvlm"], "--recipe is for measuring"),
    ],
)
def test_what_is_wrong_is_a_line(
    content: str | None,
    more: list[object],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out = tmp_path / "budgets.json", tmp_path / "profile.json"
    if content is not None:
        file.write_text(content)
    assert run("-m", MODEL, "--from-prefixkv", file, *more, "-o", out) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not out.exists()
