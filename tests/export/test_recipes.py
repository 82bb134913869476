"""Recipes: parameters, defaults by depth, the schedule, what --set accepts."""

from __future__ import annotations

import dataclasses

import pytest

from lvlm.export.recipes._base import Recipe, parse_settings
from lvlm.export.recipes.lightvlm import LightVLM
from lvlm.runtime.discovery import discover
from lvlm.runtime.errors import ParameterError
from lvlm.runtime.schedule import keep_ratios, tokens_per_layer

RECIPES: dict[str, type[Recipe]] = discover("lvlm.export.recipes", "RECIPE")


@pytest.mark.parametrize(
    ("layers", "stages"),
    [(28, (2, 8, 14)), (32, (2, 9, 16)), (6, (1, 2, 3)), (2, (1,)), (3, (1, 2)), (30, (2, 9, 15))],
)
def test_default_stages(layers: int, stages: tuple[int, ...]) -> None:
    assert LightVLM().for_layers(layers).stages == stages


@pytest.mark.parametrize(("keep", "mean"), [(0.35, 0.50), (0.15, 0.32), (0.03, 0.17)])
def test_layer_mean_fraction_of_28_blocks(keep: float, mean: float) -> None:
    """The paper-sized model: 35/15/3 % at the end are 50/32/17 % on average."""
    recipe = LightVLM(keep=keep).for_layers(28)
    reductions = recipe.reductions()
    counts = tokens_per_layer(reductions, keep_ratios(reductions, keep, None), 10_000, 28)
    assert sum(counts) / 28 / 10_000 == pytest.approx(mean, abs=0.006)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("keep=0", "keep is 0"),
        ("keep=1.5", "keep is 1.5"),
        ("keep=NaN", "keep is nan"),
        ("keep=true", "keep is True"),
        ("keep=half", "keep is 'half'"),
        ("kv_keep=0.5", "kv_keep is 0.5"),
        ("merge=recycel", "did you mean recycle"),
        ("importance=first", "importance"),
        ("absorb=0", "absorb is 0"),
        ("absorb=2.5", "absorb is 2.5"),
        ("recycle=0", "recycle is 0"),
        ("stages=[]", "stages is"),
        ("stages=[0,1]", "stages is"),
        ("stages=[3,2]", "stages is"),
        ("stages=2", "stages is"),
        ("schedule=[0.3,0.5]", "must not rise"),
        ("schedule=0.3", "schedule is a list"),
        ("kep=0.3", "did you mean keep"),
        ("keep", "write name=value"),
    ],
)
def test_wrong_settings(setting: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        parse_settings(LightVLM, [setting])


def test_settings_that_need_the_depth() -> None:
    with pytest.raises(ParameterError, match="needs at least 2 layers"):
        LightVLM().for_layers(1)
    with pytest.raises(ParameterError, match="blocks 1 to 5"):
        LightVLM(stages=(2, 6)).for_layers(6)
    with pytest.raises(ParameterError, match="2 fractions for 3 stages"):
        LightVLM(schedule=(0.5, 0.2)).for_layers(6)


def test_settings_reach_the_recipe() -> None:
    recipe = parse_settings(
        LightVLM, ["keep=0.2", "stages=[1,4]", "merge=drop", "schedule=[0.5,0.1]"]
    )
    assert recipe == LightVLM(keep=0.2, stages=(1, 4), merge="drop", schedule=(0.5, 0.1))
    settled = recipe.for_layers(6)
    assert settled.parameters()["keep"] == 0.1  # the schedule's last
    assert [r.ratio for r in settled.reductions()] == [0.5, 0.1]
    with pytest.raises(ParameterError, match="has no parameters"):
        parse_settings(RECIPES["none"], ["keep=1"])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_every_parameter_is_documented(recipe: type[Recipe]) -> None:
    assert recipe.summary
    assert recipe.source
    for field in dataclasses.fields(recipe):
        assert field.metadata["doc"], field.name
    assert recipe().for_layers(12).parameters().keys() == {
        f.name for f in dataclasses.fields(recipe)
    }
