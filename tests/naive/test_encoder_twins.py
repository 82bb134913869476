"""Recipes that drop image tokens before the language model, against a twin with loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from against import ROWS, compare_steps
from example_counts import whole
from settings import ASSETS
from twin_encoder import RULES, AtEncoder, Both, LookingTwin
from twin_model import QwenTwin, Twin
from twin_rules import FixedPoint, NoRule

COUNT = 12


@pytest.fixture(scope="module")
def twin() -> Twin:
    return Twin(ASSETS / "digits-llava")


@pytest.mark.parametrize("recipe", sorted(RULES))
def test_llava(recipe: str, bundle: Callable[..., Path], twin: Twin) -> None:
    folder = bundle("digits-llava", recipe, max_images=2)
    for keep in (0.35, 0.11):
        found = compare_steps(folder, twin, lambda k=keep: AtEncoder(recipe, k), ROWS, COUNT,
                              keep=keep)  # fmt: skip
        assert found[0].entered[0] < 160 * (keep + 0.2)


def test_closed_up(bundle: Callable[..., Path], twin: Twin) -> None:
    """As if the image had no more tokens; one step, since the twin counts on from the whole."""
    folder = bundle("digits-llava", "divprune", "places=closed", max_images=2)
    rule = AtEncoder("divprune", 0.35, closed=True)
    compare_steps(folder, twin, lambda: rule, ROWS, 1, keep=0.35)


@pytest.mark.parametrize("name", ["digits-llava", "llava:qwen2-tied-siglip"])
def test_what_the_tower_looks_at(
    name: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    """A class token, and none."""
    twin = LookingTwin(checkpoint(name))
    folder = bundle(name, "visionzip", max_images=2)
    for keep in (0.35, 0.11):
        rule = AtEncoder("visionzip", keep, looking=twin)
        compare_steps(folder, twin, lambda rule=rule: rule, ROWS, COUNT, keep=keep)


@pytest.mark.parametrize("kv", ["none", "elastic-cache"] if whole() else ["elastic-cache"])
def test_merged_at_half_depth(kv: str, bundle: Callable[..., Path], twin: Twin) -> None:
    given = [] if kv == "none" else ["kv_keep=1.0", "kv_sinks=1"]
    folder = bundle("digits-llava", "hybrid", f"kv={kv}", *given, max_images=2)
    for keep in (0.35, 0.06):

        def rule(keep: float = keep) -> NoRule:
            cache = NoRule() if kv == "none" else FixedPoint(0.6, merge=True)
            encoder = AtEncoder("divprune", keep**0.5)
            return Both([keep], [3], cache, importance="text", encoder=encoder)

        ratios = {"keep": keep} | ({} if kv == "none" else {"kv_keep": 0.6})
        found = compare_steps(folder, twin, rule, ROWS, COUNT, **ratios)
        assert len(set(found[0].entered)) == 2


def test_the_end_of_a_long_question_decides(bundle: Callable[..., Path], twin: Twin) -> None:
    """Of 64 tokens; what is before them does not."""
    folder = bundle("digits-llava", "hybrid", "kv=none", max_images=2)
    row = (f"{ROWS[0][0]} {'Read the top row again, slowly. ' * 12}ASSISTANT:", ROWS[0][1])

    def rule() -> NoRule:
        encoder = AtEncoder("divprune", 0.2**0.5)
        return Both([0.2], [3], NoRule(), importance="text", encoder=encoder)

    (found,) = compare_steps(folder, twin, rule, [row], COUNT, keep=0.2)
    images = found.entered[0] - found.entered[-1]
    assert images > 0
    assert found.entered[-1] - 29 > 2 * 64  # text tokens, beside 29 of the image


def test_three_positions(bundle: Callable[..., Path], checkpoint: Callable[[str], Path]) -> None:
    twin = QwenTwin(checkpoint("qwen2-vl:gqa"))
    folder = bundle("qwen2-vl:gqa", "divprune", max_images=2)
    random = np.random.default_rng(3)
    rows = [
        (text, [random.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes])
        for text, shapes in (
            ("USER: <image> Describe it. ASSISTANT:", [(90, 60)]),
            ("<image> and <image> Which? ASSISTANT:", [(20, 300), (70, 70)]),
            ("USER: Describe this: <image>", [(20, 300)]),
        )
    ]
    for keep in (0.5, 0.2):
        compare_steps(folder, twin, lambda k=keep: AtEncoder("divprune", k), rows, COUNT, keep=keep)
