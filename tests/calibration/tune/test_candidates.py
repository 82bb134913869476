"""What is tried: every recipe alone and with every cache policy, at every fraction."""

from __future__ import annotations

import pytest

from lvlm.calibration.tune.candidates import FULL, Candidate, candidates, with_room
from lvlm.calibration.tune.tune_arguments import KEEPS, KV_KEEPS, RECIPES
from lvlm.core.errors import ParameterError


def test_every_pair() -> None:
    found = candidates(["divprune", "snapkv", "interval", "none"], [0.5, 0.2], [0.3])
    assert [one.label for one in found] == [
        *("none", "divprune keep 0.5", "divprune keep 0.2", "snapkv kv-keep 0.3"),
        *("divprune keep 0.5 + snapkv kv-keep 0.3", "divprune keep 0.2 + snapkv kv-keep 0.3"),
        *("divprune keep 0.5 + interval kv-keep 0.3", "divprune keep 0.2 + interval kv-keep 0.3"),
    ]
    assert found[4].settings == ["keep=0.5", "kv=snapkv", "kv_keep=0.3"]
    assert found[4].made().parameters()["kv_keep"] == 0.3
    assert len({one.bundle for one in found}) == 5


def test_the_defaults_are_recipes() -> None:
    found = candidates(RECIPES, KEEPS, KV_KEEPS)
    assert len(found) == 1 + 4 * 4 + 2 + 4 * 4 * 2
    assert len(set(found)) == len(found)


def test_a_bundle_has_room_for_all_that_it_serves() -> None:
    some = [one for one in candidates(["hybrid", "snapkv"], [0.2, 0.5], [0.4, 0.1])
            if one.bundle == ("hybrid", "snapkv")]  # fmt: skip
    assert with_room(some) == Candidate("hybrid", "snapkv", 0.5, 0.4)
    assert with_room([FULL]) == FULL


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["divprun"], "divprune"),
        (["interval"], "add one of these"),
        (["interval", "snapkv"], "add one of these"),
    ],
)
def test_names_that_make_no_candidates(names: list[str], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        candidates(names, [0.5], [0.5])


def test_settings_are_those_of_the_recipe_and_of_its_policy() -> None:
    found = candidates(
        ["lightvlm", "snapkv", "interval"],
        [0.5],
        [0.3],
        ["snapkv.window=16", "lightvlm.stages=[4]", "kv_floor=8"],
    )
    assert [(one.label, list(one.fixed)) for one in found] == [
        ("none", []),
        ("lightvlm keep 0.5", ["stages=[4]"]),
        ("snapkv kv-keep 0.3", ["window=16"]),
        ("lightvlm keep 0.5 + snapkv kv-keep 0.3", ["stages=[4]", "kv.window=16"]),
        ("lightvlm keep 0.5 + interval kv-keep 0.3", ["stages=[4]", "kv_floor=8"]),
    ]
    made = [one.made().parameters() for one in found[1:]]
    assert [p.get("window") for p in made] == [None, 16, None, None]
    assert made[2]["kv_set"] == ("window=16",)
    assert made[3]["kv_floor"] == 8
    assert with_room(found[3:4]) == found[3]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("snapkv.windw=16", "window"),
        ("snapk.window=16", "snapkv"),
        ("window", "write name=value"),
        ("lightvlm.keep=0.3", "give its values by --keep"),
        ("snapkv.kv_keep=0.3", "give its values by --kv-keep"),
        ("lightvlm.kv=tova", "give its values by --recipes"),
        ("lightvlm.kv_interval=8", "add interval to --recipes"),
        ("lightvlm.kv_windw=8", "parameter of recipe 'lightvlm'"),
    ],
)
def test_settings_that_no_candidate_can_have(setting: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        candidates(["lightvlm", "snapkv"], [0.5], [0.5], [setting])
