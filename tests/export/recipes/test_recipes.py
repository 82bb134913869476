"""Recipes: parameters, defaults by depth, the schedule, what --set accepts."""

from __future__ import annotations

import pytest

from lvlm.core.discovery import discover
from lvlm.core.errors import ParameterError
from lvlm.export.recipes.lightvlm import LightVLM
from lvlm.export.recipes.prefixkv import PrefixKV
from lvlm.export.recipes.recipe import Recipe, cache_recipes, parse_settings, settable
from lvlm.export.recipes.uniform import UniformRecipe
from lvlm.runtime.kv.image_tokens import keep_ratios, tokens_per_layer
from lvlm.runtime.policies.evictions import Append, Interval, Oldest
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.scores import Accumulated, Latest, Recency, Window
from lvlm.runtime.policies.selections import Evict
from lvlm.runtime.policies.shares import Mixed, Profile, ProfileRow, Slope, Uniform

RECIPES: dict[str, type[Recipe]] = discover("lvlm.export.recipes", "RECIPE")


@pytest.mark.parametrize(
    ("layers", "stages"),
    [(28, (2, 8, 14)), (32, (2, 9, 16)), (6, (1, 2, 3)), (2, (1,)), (3, (1, 2)), (30, (2, 9, 15))],
)
def test_default_stages(layers: int, stages: tuple[int, ...]) -> None:
    assert LightVLM().for_layers(layers).stages == stages


def test_stages_of_presets() -> None:
    assert RECIPES["fastv"]().for_layers(32).token_reduction().stages == (2,)
    assert RECIPES["fastv"]().for_layers(28, 3).token_reduction().stages == (3,)
    assert RECIPES["fastv"]().for_layers(2).token_reduction().stages == (1,)
    dropping = RECIPES["pyramiddrop"]().for_layers(32)
    assert dropping.token_reduction().stages == (8, 16, 24)
    shortenings = dropping.shortenings()
    assert keep_ratios(shortenings, 0.125, None) == pytest.approx((0.5, 0.25, 0.125))
    for name, stages in (("fastv", (2,)), ("pyramiddrop", (8, 16, 24))):
        made = RECIPES[name]().for_layers(32)
        assert made.cache_policy() is None
        own = LightVLM(stages=stages, importance="last", merge="drop", kv="none").for_layers(32)
        assert made.token_reduction() == own.token_reduction()


def test_default_stages_wait_for_all_features() -> None:
    """DeepStack adds some behind the first blocks, for all image tokens."""
    assert LightVLM().for_layers(28, 3).stages == (3, 8, 14)
    assert LightVLM().for_layers(6, 2).stages == (2, 3)
    assert LightVLM().for_layers(3, 3).stages == (2,)  # which is then refused


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
        ("kv_keep=0", "kv_keep is 0; give a number above 0"),
        ("kv_keep=1.01", "kv_keep is 1.01"),
        ("kv_keep=NaN", "kv_keep is nan"),
        ("kv_cap=35", "kv_cap is 35, but 36 entries are protected; give an integer of 36"),
        ("kv_floor=-1", "kv_floor is -1"),
        ("kv_protect=0", "kv_protect is 0"),
        ("kv_interval=0", "kv_interval is 0"),
        ("kv_sinks=1.5", "kv_sinks is 1.5"),
        ("kv=prefixvk", "did you mean prefixkv"),
        ("kv=lightvlm", "unknown value of kv"),
        ("positions=layer1", "did you mean layer0"),
        ("rows=[]", "rows"),
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


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("elastic-cache", ("kv_keep=0",), "kv_keep is 0; give a number above 0 and up to 1"),
        ("uniform", ("kv_keep=1.5",), "kv_keep is 1.5"),
        ("uniform", ("kv_cap=1",), "kv_cap is 1, but 2 entries are protected; give .* 2 or more"),
        ("uniform", ("kv_sinks=4", "kv_cap=4"), "5 entries are protected"),
        ("uniform", ("distance=0",), "distance is 0"),
        ("elastic-cache", ("semantics=papers",), "did you mean paper"),
        ("elastic-cache", ("semantics=reference", "kv_cap=9"), "has no kv_cap"),
        ("prefixkv", ("semantics=reference", "kv_cap=9"), "has no kv_cap"),
        ("prefixkv", ("profile=a.json", "kv_keep=0.2"), "profile and kv_keep are both given"),
        ("prefixkv", ("profile=a.json", "samples=b.jsonl"), "profile and samples are both given"),
        ("lightvlm", ("kv_profile=a.json", "kv_keep=0.2"), "kv_profile and kv_keep are both"),
        ("lightvlm", ("kv=none", "kv_keep=0.5"), "kv=none keeps the whole cache"),
        ("lightvlm", ("kv=prefixkv", "kv_floor=8"), "kv_floor belongs to kv=interval"),
        ("lightvlm", ("kv=elastic-cache", "kv_profile=a.json"), "takes no profile"),
        ("lightvlm", ("kv=prefixkv", "kv_cap=4"), "5 entries are protected"),
        ("lightvlm", ("kv=snapkv", "positions=layer0"), "kv=snapkv takes no positions"),
        ("lightvlm", ("kv=snapkv", "kv.windw=3"), "did you mean window"),
        ("lightvlm", ("kv.window=3",), "kv.window=3 is for a recipe that kv names"),
        ("snapkv", ("window=0",), "window is 0; give an integer of 1 or more"),
        ("snapkv", ("window=16", "kv_cap=10"), "kv_cap is 10, but 16 entries are protected"),
        ("snapkv", ("kernel=4",), "kernel is 4; give an odd number"),
        ("snapkv", ("pool=maxx",), "did you mean max"),
        ("snapkv", ("kv_keep=2",), "kv_keep is 2; give a number above 0"),
        ("snapkv", ("kv_sinks=-1",), "kv_sinks is -1"),
        ("pyramidkv", ("beta=0.5",), "beta is 0.5; give a number of 1 .* or more"),
        ("pyramidkv", ("beta=steep",), "beta is 'steep'"),
        ("streaming-llm", ("kv_cap=4",), "kv_cap is 4, but 5 entries are protected"),
        ("tova", ("kv_interval=0",), "kv_interval is 0; give an integer of 1 or more"),
        ("h2o", ("recent=0",), "no entry is protected"),
        ("h2o", ("recent=9", "kv_cap=8"), "kv_cap is 8, but 9 entries are protected"),
        ("prefixkv", ("adaptive=0",), "adaptive is 0"),
        ("prefixkv", ("adaptive=0.2", "semantics=reference"), "has no adaptive"),
    ],
)
def test_wrong_cache_settings(recipe: str, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        parse_settings(RECIPES[recipe], settings)


@pytest.mark.parametrize(
    ("recipe", "settings", "keep"),
    [
        ("lightvlm", (), 1.0),
        ("lightvlm", ("kv_keep=0.5",), 0.5),
        ("lightvlm", ("kv_cap=60",), 1.0),
        ("lightvlm", ("kv=uniform",), 0.5),
        ("fastv", ("kv=interval",), 0.5),
        ("hybrid", ("kv=interval",), 0.5),
    ],
)
def test_a_cache_is_halved_where_that_was_asked_for(
    recipe: str, settings: tuple[str, ...], keep: float
) -> None:
    made = parse_settings(RECIPES[recipe], settings).for_layers(6)
    policy = made.cache_policy()
    assert policy is not None
    assert policy.budget.keep == keep
    recorded = made.parameters()["kv_keep"]  # of another recipe's cache that recipe knows it
    assert recorded == (None if settings == ("kv=uniform",) else keep)


def test_lightvlm_takes_any_cache_recipe() -> None:
    """Its cache is its own, none, or that of any other recipe, with the shared parameters."""
    own = LightVLM().for_layers(6)
    rule = own.cache_rule()
    assert rule is not None
    assert rule.cache_policy == CachePolicy(
        Window(32), Evict(), Interval(64, 128), Uniform(1.0), sinks=4, recent=32
    )
    assert own.parameters()["kv_floor"] == 128
    assert LightVLM(kv="none").cache_rule() is None
    shortening = {
        "lightvlm",
        "fastv",
        "pyramiddrop",
        "hybrid",
        "visionzip",
        "divprune",
        "evs",
        "random",
        "strided",
    }
    assert cache_recipes().keys() == RECIPES.keys() - {"none", *shortening}
    for name, kind in cache_recipes().items():
        takes = {f.name for f in settable(kind)}
        shared = {"kv_keep": 0.3, "kv_sinks": 4, "positions": "layer0", "kv_cap": 90}
        shared = {name: value for name, value in shared.items() if name in takes}
        given = [f"{name}={value}" for name, value in shared.items()]
        merged = parse_settings(LightVLM, [f"kv={name}", *given]).for_layers(6)
        assert merged.cache_policy() == parse_settings(kind, given).cache_policy()
        assert merged.cache_policy() is not None
        usual = LightVLM(kv=name).for_layers(6)
        assert usual.parameters()["kv_sinks"] == (4 if "kv_sinks" in takes else None)


def test_settings_of_the_cache_recipe_that_merging_is_combined_with() -> None:
    recipe = parse_settings(LightVLM, ["kv=snapkv", "kv.window=16", "kv.pool=max", "kv_cap=40"])
    alone = parse_settings(RECIPES["snapkv"], ["window=16", "pool=max", "kv_cap=40", "kv_sinks=4"])
    assert recipe.cache_policy() == alone.cache_policy()
    assert recipe.for_layers(6).parameters()["kv_set"] == ("window=16", "pool=max")


def test_presets_are_compositions() -> None:
    assert RECIPES["snapkv"]().cache_policy() == CachePolicy(
        Window(64, 5, "mean", per_head=True), Evict(), Append(), Uniform(0.5), recent=64
    )
    assert RECIPES["pyramidkv"]().cache_policy() == CachePolicy(
        Window(8, 5, "mean", per_head=True), Evict(), Append(), Slope(0.5), recent=8
    )
    assert RECIPES["streaming-llm"]().cache_policy() == CachePolicy(
        Recency(), Evict(), Oldest(), Uniform(0.5), sinks=4
    )
    assert RECIPES["tova"]().cache_policy() == CachePolicy(
        Latest(), Evict(), Interval(1), Uniform(0.5), recent=1
    )
    assert RECIPES["h2o"]().cache_policy() == CachePolicy(
        Accumulated(), Evict(), Interval(1), Uniform(0.5), recent=32
    )


def test_a_part_of_a_budget_follows_a_profile() -> None:
    rows = (ProfileRow(0.2, (0.1, 0.3)),)
    mixed = PrefixKV(adaptive=0.2).with_profile(0.2, rows).cache_policy()
    assert mixed.budget == Mixed(0.2, None, rows, 0.2)
    assert PrefixKV().with_profile(0.2, rows).cache_policy().budget == Profile(0.2, None, rows)


def test_a_recipe_with_a_profile_has_nothing_left_to_calibrate() -> None:
    rows = (ProfileRow(0.2, (0.1, 0.3)),)
    for recipe in (PrefixKV(), LightVLM(kv="prefixkv"), LightVLM(kv_profile="p.json")):
        wanted = recipe.calibration()
        assert wanted is not None
        assert wanted.file == getattr(recipe, "kv_profile", None)
        ready = recipe.with_profile(0.2, rows)
        assert ready.calibration() is None
        rule = ready.cache_rule()
        assert rule is not None
        assert rule.cache_policy.budget == Profile(0.2, None, rows)
    with pytest.raises(ParameterError, match="takes no profile"):
        UniformRecipe().with_profile(0.2, rows)


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
def test_every_default_can_be_set(recipe: type[Recipe]) -> None:
    """As it is shown: ``positions=true`` is a word, though JSON has it, too."""
    for field in settable(recipe):
        if field.default is not None:
            parsed = parse_settings(recipe, [f"{field.name}={field.default}"])
            assert getattr(parsed, field.name) == field.default


def test_a_file_may_be_named_like_a_number() -> None:
    assert parse_settings(RECIPES["prefixkv"], ["samples=2026"]).parameters()["samples"] == "2026"


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_every_parameter_is_documented(recipe: type[Recipe]) -> None:
    assert recipe.summary
    assert recipe.source
    for field in settable(recipe):
        assert field.metadata["doc"], field.name
    parameters = recipe().for_layers(12).parameters()
    assert parameters.keys() == {f.name for f in settable(recipe)}
