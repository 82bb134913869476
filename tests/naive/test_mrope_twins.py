"""Qwen2-VL's bundles against a twin: three positions per token, images of several sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from against import Row, compare_steps
from twin_model import QwenTwin
from twin_recipes import Settings, arguments, rule_of

COUNT = 40
# A word between two images, without which transformers sees one.
ROWS: list[Row] = [
    ("USER: Describe this: <image>", [(20, 300)]),  # its last token's three positions differ
    ("USER: <image> Describe it. ASSISTANT:", [(90, 60)]),
    ("<image> and <image> Which? ASSISTANT:", [(20, 300), (70, 70)]),
    ("USER: How often does 7 appear? ASSISTANT:", []),
]
Case = tuple[str, Settings, list[dict[str, Any]]]
# The first three are bundles that other tests have, too.
USUAL: list[Case] = [
    ("none", {}, [{}]),
    ("lightvlm", {"kv_keep": 0.5}, [{"keep": 0.35}, {"keep": 1e-6}]),
    ("elastic-cache", {"kv_keep": 1.0}, [{"kv_keep": 0.5}]),
]
WHOLE: list[Case] = [
    *USUAL,
    (
        "lightvlm",
        {"kv": "interval", "kv_keep": 1.0, "kv_floor": 6, "kv_protect": 5, "kv_interval": 9},
        [{"keep": 0.35, "kv_keep": 0.4}, {"keep": 1.0, "kv_keep": 1.0}, {"keep": 1e-6}],
    ),
    ("lightvlm", {"kv": "uniform", "kv_keep": 1.0}, [{"keep": 0.5, "kv_keep": 0.4}]),
    ("prefixkv", {"kv_keep": 1.0, "positions": "layer0"}, [{"kv_keep": 0.6}]),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = WHOLE if metafunc.config.getoption("--whole") else USUAL
        names = [f"{recipe} {settings.get('kv', '')}".strip() for recipe, settings, _ in cases]
        metafunc.parametrize("case", cases, ids=names)


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def test_qwen2_vl(
    case: Case,
    checkpoint: Callable[[str], Path],
    bundle: Callable[..., Path],
) -> None:
    recipe, settings, calls = case
    twin = QwenTwin(checkpoint("qwen2-vl:gqa"))
    folder = bundle("qwen2-vl:gqa", recipe, *arguments(settings), max_images=2)
    rows = [(text, [image(*shape) for shape in shapes]) for text, shapes in ROWS]
    for ratios in calls:
        own = {"kv_keep": settings.get("kv_keep", 1.0)} | ratios  # as exported where none is given
        compare_steps(
            folder,
            twin,
            lambda own=own: rule_of(recipe, settings, folder, **own),
            rows,
            COUNT,
            **ratios,
        )
