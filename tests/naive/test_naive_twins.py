"""Bundles on ONNX Runtime against twins that share no code with them: the recipes written anew as
plain loops (twin_rules.py) over transformers' own modules (twin_model.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import ASSETS, CACHED
from PIL import Image
from twin_model import Twin
from twin_rules import FixedPoint, Interval, NoRule, Pyramid

import lvlm

IMAGE = "<image>\n"
PICTURES = [np.asarray(Image.open(ASSETS / f"samples/digits-{i}.png")) for i in (1, 2)]
ROWS: list[tuple[str, list[np.ndarray]]] = [
    (f"USER: {IMAGE}Describe the picture. ASSISTANT:", PICTURES[:1]),
    ("USER: How often does 7 appear in a picture that nobody gave you? ASSISTANT:", []),
    (f"USER: {IMAGE}and {IMAGE}Which digit is in the top row? ASSISTANT:", PICTURES[::-1]),
]
COUNT = 48  # tokens: three compactions at the tests' interval
STAGES = [1, 2, 3]  # of six blocks: max(1, round(6 x 1/14, 2/7, 1/2))
TOKENS = 144  # of a picture of tiny-llava


@pytest.fixture(scope="module")
def twin() -> Twin:
    return Twin(ASSETS / "tiny-llava")


def shares(folder: Path, keep: float) -> list[float]:
    """Of every layer at ``keep``, from the profile's rows, with nothing and everything at its
    ends."""
    rows = {row["keep"]: row["fractions"] for row in _rows(folder) if row["keep"] < 1}
    layers = len(next(iter(rows.values())))
    rows |= {0.0: [0.0] * layers, 1.0: [1.0] * layers}
    below, above = max(k for k in rows if k <= keep), min(k for k in rows if k >= keep)
    part = 0.0 if above == below else (keep - below) / (above - below)
    pairs = zip(rows[below], rows[above], strict=True)
    return [low + (high - low) * part for low, high in pairs]


def _rows(folder: Path) -> list[dict[str, Any]]:
    rows = json.loads((folder / "lvlm.json").read_text())["compression"]["profile"]
    assert isinstance(rows, list)
    return rows


def compare(bundle: Path, twin: Twin, rule: Callable[[], NoRule], **ratios: float) -> list[int]:
    """Tokens and counts of every row, alone and in a batch; entries kept of the first one."""
    options: dict[str, Any] = {
        "max_new_tokens": COUNT, "chat_template": False, "ignore_eos": True, **ratios,
    }  # fmt: skip
    expected = [twin.answer(prompt, pictures, rule(), COUNT) for prompt, pictures in ROWS]
    with lvlm.load(bundle) as model:
        texts, pictures = [row[0] for row in ROWS], [row[1] for row in ROWS]
        together = model.generate(texts, pictures, **options)
        alone = model.generate(*ROWS[2], **options)
    for ours, theirs in zip([*together, alone], [*expected, expected[2]], strict=True):
        assert list(ours.token_ids) == theirs.tokens
        assert list(ours.stats.tokens_per_layer) == theirs.entered
        assert list(ours.stats.kept_per_layer) == theirs.kept
    assert len({tuple(answer.tokens) for answer in expected}) == len(ROWS)  # the prompt matters
    return expected[0].kept


def test_none(bundle: Callable[..., Path], twin: Twin) -> None:
    compare(bundle("tiny-llava", max_images=2), twin, NoRule)


@pytest.mark.parametrize("keep", [0.3, 0.75])
@pytest.mark.parametrize("recipe", ["uniform", "elastic-cache", "prefixkv"])
def test_fixed_point(recipe: str, keep: float, bundle: Callable[..., Path], twin: Twin) -> None:
    name, *settings = CACHED[f"{recipe} (cached)"]
    folder = bundle("tiny-llava", name, *settings, max_images=2)

    def rule() -> FixedPoint:
        own = shares(folder, keep) if recipe == "prefixkv" else None
        return FixedPoint(keep, merge=recipe == "elastic-cache", shares=own)

    kept = compare(folder, twin, rule, kv_keep=keep)
    assert max(kept) < 160
    assert (len(set(kept)) > 1) == (recipe == "prefixkv")


@pytest.mark.parametrize(("keep", "kv_keep"), [(0.35, 0.3), (0.1, 1.0)])
def test_lightvlm(keep: float, kv_keep: float, bundle: Callable[..., Path], twin: Twin) -> None:
    name, *settings = CACHED["lightvlm (cached)"]  # floor 8, protect 8, interval 16
    folder = bundle("tiny-llava", name, *settings, max_images=2)

    def rule() -> Pyramid:
        return Pyramid(keep, STAGES, TOKENS, Interval(kv_keep, floor=8, protect=8, interval=16))

    kept = compare(folder, twin, rule, keep=keep, kv_keep=kv_keep)
    assert kept[0] > kept[-1]


def test_lightvlm_over_another_cache(bundle: Callable[..., Path], twin: Twin) -> None:
    name, *settings = CACHED["lightvlm with prefixkv"]
    folder = bundle("tiny-llava", name, *settings, max_images=2)

    def rule() -> Pyramid:
        cache = FixedPoint(0.6, shares=shares(folder, 0.6), sinks=4)
        return Pyramid(0.5, STAGES, TOKENS, cache)

    compare(folder, twin, rule, keep=0.5, kv_keep=0.6)


@pytest.mark.parametrize("wrong", [{"distance": 24}, {"merge": True}])
def test_a_wrong_choice_shows(
    wrong: dict[str, Any], bundle: Callable[..., Path], twin: Twin
) -> None:
    name, *settings = CACHED["uniform (cached)"]
    folder = bundle("tiny-llava", name, *settings, max_images=2)
    with pytest.raises(AssertionError, match="=="):
        compare(folder, twin, lambda: FixedPoint(0.3, **wrong), kv_keep=0.3)
