"""Bundles on ONNX Runtime against twins that share no code with them: the recipes written anew as
plain loops (twin_rules.py, twin_merging.py) over transformers' own modules (twin_model.py).

Here the trained model by ``generate``; drawn checkpoints are in test_drawn_twins.py, Qwen-VL's
positions in test_mrope_twins.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from against import ROWS
from example_counts import whole
from made_profile import write_profile
from settings import ASSETS, CACHED
from twin_model import Twin
from twin_recipes import Settings, arguments, rule_of
from twin_rules import FixedPoint, NoRule

import lvlm

COUNT = 48  # tokens: three compactions at the tests' interval
INTERVAL: Settings = {"kv_keep": 1.0, "kv_floor": 8, "kv_protect": 8, "kv_interval": 16}


@pytest.fixture(scope="module")
def twin() -> Twin:
    return Twin(ASSETS / "digits-llava")


def compare(bundle: Path, twin: Twin, rule: Callable[[], NoRule], **ratios: float) -> list[int]:
    """Tokens and counts of every row, alone and in a batch; entries kept of the first one."""
    options: dict[str, Any] = {
        "max_new_tokens": COUNT, "chat_template": False, "ignore_eos": True, **ratios,
    }  # fmt: skip
    rows = ROWS[: 3 : 1 if whole() else 2]  # one image, none, two; in a normal run not none
    expected = [twin.answer(prompt, images, rule(), COUNT) for prompt, images in rows]
    with lvlm.load(bundle) as model:
        texts, images = [row[0] for row in rows], [row[1] for row in rows]
        together = model.generate(texts, images, **options)
        alone = model.generate(*rows[-1], **options)
    for ours, theirs in zip([*together, alone], [*expected, expected[-1]], strict=True):
        assert list(ours.token_ids) == theirs.tokens
        assert list(ours.stats.tokens_per_layer) == theirs.entered
        assert list(ours.stats.kept_per_layer) == theirs.kept
    assert len({tuple(answer.tokens) for answer in expected}) == len(rows)  # the prompt matters
    return expected[0].kept


def test_none(bundle: Callable[..., Path], twin: Twin) -> None:
    compare(bundle("digits-llava", max_images=2), twin, NoRule)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "keep" in metafunc.fixturenames and "kv_keep" not in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole")
        metafunc.parametrize("keep", [0.3, 0.75] if whole else [0.3])


@pytest.mark.parametrize("recipe", ["uniform", "elastic-cache", "prefixkv"])
def test_fixed_point(recipe: str, keep: float, bundle: Callable[..., Path], twin: Twin) -> None:
    folder = bundle("digits-llava", recipe, "kv_keep=1.0", max_images=2)
    kept = compare(folder, twin, lambda: rule_of(recipe, {}, folder, kv_keep=keep), kv_keep=keep)
    assert max(kept) < 160
    assert (len(set(kept)) > 1) == (recipe == "prefixkv")


@pytest.mark.parametrize("kv_keep", [0.3, 0.05] if whole() else [0.05])
def test_merging_within_a_modality(kv_keep: float, bundle: Callable[..., Path], twin: Twin) -> None:
    """With room for both sides of every border, and without."""
    settings: Settings = {"kv_keep": 1.0, "within_modality": True}
    folder = bundle("digits-llava", "elastic-cache", *arguments(settings), max_images=2)
    ratios = {"kv_keep": kv_keep}
    compare(folder, twin, lambda: rule_of("elastic-cache", settings, folder, **ratios), **ratios)


@pytest.mark.parametrize("recipe", ["snapkv", "pyramidkv", "streaming-llm", "tova", "h2o"])
def test_compositions(recipe: str, keep: float, bundle: Callable[..., Path], twin: Twin) -> None:
    name, *given = CACHED[f"{recipe} (cached)"]
    settings: Settings = dict(setting.split("=") for setting in given)
    own = {key: int(value) for key, value in settings.items() if value.isdecimal()}
    folder = bundle("digits-llava", name, *given, max_images=2)
    kept = compare(folder, twin, lambda: rule_of(recipe, own, folder, kv_keep=keep), kv_keep=keep)
    assert max(kept) < 160


@pytest.mark.parametrize("recipe", ["snapkv", "streaming-llm", "prefixkv"][:: 1 if whole() else 3])
def test_any_score_merges(recipe: str, bundle: Callable[..., Path], twin: Twin) -> None:
    name, *given = CACHED[f"{recipe} (cached)"]
    folder = bundle("digits-llava", name, *given, "select=merge", max_images=2)
    own: Settings = {"select": "merge"}
    own |= {
        key: int(value) for key, _, value in (x.partition("=") for x in given) if value.isdecimal()
    }
    kept = compare(folder, twin, lambda: rule_of(recipe, own, folder, kv_keep=0.3), kv_keep=0.3)
    assert max(kept) < 160


@pytest.mark.parametrize(("keep", "kv_keep"), [(0.35, 0.3), (0.1, 1.0)])
def test_lightvlm(keep: float, kv_keep: float, bundle: Callable[..., Path], twin: Twin) -> None:
    folder = bundle("digits-llava", "lightvlm", *arguments(INTERVAL), max_images=2)
    ratios = {"keep": keep, "kv_keep": kv_keep}
    kept = compare(folder, twin, lambda: rule_of("lightvlm", INTERVAL, folder, **ratios), **ratios)
    assert kept[0] > kept[-1]


def test_lightvlm_over_another_cache(bundle: Callable[..., Path], twin: Twin) -> None:
    settings: Settings = {"kv": "prefixkv", "kv_keep": 1.0, "merge": "illava"}
    folder = bundle("digits-llava", "lightvlm", *arguments(settings), max_images=2)
    ratios = {"keep": 0.5, "kv_keep": 0.6}
    compare(folder, twin, lambda: rule_of("lightvlm", settings, folder, **ratios), **ratios)


def test_lightvlm_with_shares_of_a_file(
    bundle: Callable[..., Path], twin: Twin, shared: Path
) -> None:
    """A fraction between two rows of it, and the one that it was made for."""
    file = write_profile(shared / "profiles/digits-llava.json", ASSETS / "digits-llava", 6, 0.5)
    settings = INTERVAL | {"kv_profile": str(file)}
    del settings["kv_keep"]
    folder = bundle("digits-llava", "lightvlm", *arguments(settings), max_images=2)
    for given in ({"kv_keep": 0.3}, {}):
        ratios = {"keep": 0.75, "kv_keep": 0.5} | given
        kept = compare(
            folder,
            twin,
            lambda own=ratios: rule_of("lightvlm", settings, folder, **own),
            keep=0.75,
            **given,
        )
        assert len(set(kept)) > 3, kept


@pytest.mark.parametrize("wrong", [{"distance": 24}, {"merge": True}])
def test_a_wrong_choice_shows(
    wrong: dict[str, Any], bundle: Callable[..., Path], twin: Twin
) -> None:
    name, *settings = CACHED["uniform (cached)"]
    folder = bundle("digits-llava", name, *settings, max_images=2)
    with pytest.raises(AssertionError, match="=="):
        compare(folder, twin, lambda: FixedPoint(0.3, **wrong), kv_keep=0.3)
