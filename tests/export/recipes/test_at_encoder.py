"""Recipes that drop image tokens before the language model: their parameters, and their counts."""

from __future__ import annotations

import pytest

from lvlm.core.discovery import discover
from lvlm.core.errors import ParameterError
from lvlm.export.recipes.hybrid import Hybrid
from lvlm.export.recipes.recipe import Recipe, parse_settings
from lvlm.runtime.bundle.manifest import EncoderReduction
from lvlm.runtime.kv.image_tokens import keep_ratios, plan_prefill, tokens_per_layer
from lvlm.runtime.reductions import rules

RECIPES: dict[str, type[Recipe]] = discover("lvlm.export.recipes", "RECIPE")
ALONE = ("divprune", "random", "strided")


@pytest.mark.parametrize("name", ALONE)
def test_each_has_its_rule_and_leaves_the_graphs_alone(name: str) -> None:
    recipe = parse_settings(RECIPES[name], ["keep=0.25"]).for_layers(6)
    reduction = recipe.encoder_reduction()
    assert reduction is not None
    assert reduction.rule in rules()
    assert recipe.inputs() == recipe.outputs() == []
    assert recipe.in_place
    assert tokens_per_layer(recipe.shortenings(), (0.25,), 577, 6) == [144] * 6


def test_settings_get_to_the_rule() -> None:
    recipe = parse_settings(RECIPES["random"], ["seed=7", "places=closed"])
    assert recipe.encoder_reduction() == EncoderReduction(
        "random", 1.0, None, "closed", {"seed": 7}
    )


@pytest.mark.parametrize("name", [*ALONE, "hybrid"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("keep=0", "keep is 0"),
        ("places=here", "unknown value of places 'here'"),
        ("kv=snap", "did you mean snapkv"),
        ("kv_interval=5", "kv_interval belongs to kv=interval, not to kv=none"),
        ("kv_keep=0.5", "kv=none keeps the whole cache"),
    ],
)
def test_what_is_wrong_is_said(name: str, setting: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        parse_settings(RECIPES[name], [setting])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("share=0", "share is 0"),
        ("stage=0", "stage is 0"),
        ("encoder=best", "unknown value of encoder 'best'"),
        ("merge=mix", "unknown value of merge 'mix'"),
    ],
)
def test_what_is_wrong_in_a_hybrid(setting: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        parse_settings(Hybrid, [setting])


def test_a_hybrid_merges_at_half_depth() -> None:
    assert [Hybrid().for_layers(n).stage for n in (2, 6, 7, 32)] == [1, 3, 4, 16]
    assert Hybrid().for_layers(6, 5).stage == 5
    for layers, stage in ((1, None), (4, 4)):
        with pytest.raises(ParameterError, match=r"block|layers"):
            Hybrid(stage=stage).for_layers(layers)


def test_counts_of_a_hybrid_are_of_the_whole_image() -> None:
    recipe = Hybrid(keep=0.09, share=0.5).for_layers(4)
    shortenings = recipe.shortenings()
    ratios = keep_ratios(shortenings, 0.09, None)
    assert ratios == pytest.approx((0.3, 0.09))
    plan = plan_prefill(shortenings, ratios, 4, [10, 3], [[100], []], [4, 0])
    assert plan.entries.tolist() == [[40, 3], [40, 3], [19, 3], [19, 3]]
    assert plan.maps == (40,)
    assert plan.inputs["keep_0"].tolist() == [[9], [0]]
    assert "keep_1" not in plan.inputs
    assert keep_ratios(shortenings, 0.09, [0.5, 0.2]) == (0.5, 0.2)
