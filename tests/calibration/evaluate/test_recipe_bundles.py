"""Bundles that lvlm-eval makes of recipes and their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lvlm.calibration.evaluate import recipe_bundles


def parameters(
    recipes: list[str], settings: list[str], keeps: list[float], kv_keeps: list[float]
) -> list[dict[str, Any]]:
    found = recipe_bundles.parse_recipes(recipes, settings, keeps, kv_keeps)
    return [recipe.parameters() for recipe in found]


def test_settings_reach_their_recipes() -> None:
    settings = ["kv_sinks=2", "uniform.distance=9", "merge=drop"]
    none, uniform, light = parameters(["none", "uniform", "lightvlm"], settings, [], [])
    assert none == {}
    assert (uniform["kv_sinks"], uniform["distance"]) == (2, 9)
    assert (light["kv_sinks"], light["merge"], light["keep"]) == (2, "drop", 0.35)


def test_bundles_have_room_for_the_largest_fraction() -> None:
    def room(keeps: list[float], kv_keeps: list[float], *settings: str) -> list[tuple[Any, Any]]:
        found = parameters(["uniform", "lightvlm"], list(settings), keeps, kv_keeps)
        return [(p.get("keep"), p["kv_keep"]) for p in found]

    assert room([0.2, 0.7], []) == [(None, 0.7), (1.0, 1.0)]
    assert room([0.2], [0.3]) == [(None, 0.2), (1.0, 1.0)]
    assert room([], [0.3, 0.4]) == [(None, 0.5), (1.0, 0.4)]
    assert room([], [], "kv_keep=0.6") == [(None, 0.6), (0.35, 0.6)]


@pytest.mark.parametrize(
    ("settings", "keeps", "message"),
    [
        (["distnce=9"], [], "did you mean distance"),
        (["unifrom.distance=9"], [], "did you mean uniform"),
        (["uniform.distnce=9"], [], "did you mean distance"),
        (["distance"], [], "write name=value"),
        (["lightvlm.keep=0.2"], [0.5], "exclude one another"),
        (["uniform.kv_keep=0.2"], [0.5], "exclude one another"),
        (["schedule=[0.5,0.4,0.3]"], [0.5], "cannot change a schedule"),
    ],
)
def test_settings_that_cannot_be(settings: list[str], keeps: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameters(["uniform", "lightvlm"], settings, keeps, [])


def test_a_bundle_is_made_anew_for_other_contents(tmp_path: Path) -> None:
    folders = set()
    common: dict[str, Any] = {"dtype": None, "revision": None, "validate": False}
    for settings, images in (([], 1), ([], 2), (["distance=9"], 1), ([], 1)):
        recipes = recipe_bundles.parse_recipes(["uniform"], settings, [], [])
        (order,) = recipe_bundles.order(
            recipes, tmp_path, model="tiny-llava", max_text_len=64, max_images=images, **common
        )
        folders.add(order.folder.name)
    assert len(folders) == 3
    assert all(name.startswith("uniform-") for name in folders)
