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
