"""Bundles of Gemma 3, PaliGemma, Mistral 3, Pixtral and Qwen3.5 against their twins: windows,
images and prompts whose tokens see one another, images of several sizes with text between their
rows, linear attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from against import Row, compare_steps
from example_counts import whole
from twin_families import DeltaTwin, GemmaTwin, PaliGemmaTwin, PixtralTwin
from twin_model import Twin
from twin_recipes import Settings, arguments, rule_of

COUNT = 24
ROWS: list[Row] = [
    ("USER: Describe this: <image> ASSISTANT:", [(40, 30)]),
    ("USER: How often does 7 appear? ASSISTANT:", []),
    ("<image> and <image> Which? ASSISTANT:", [(20, 70), (60, 60)]),
]
TWINS: dict[str, type[Twin]] = {
    "gemma3": GemmaTwin,
    "paligemma": PaliGemmaTwin,
    "mistral3": PixtralTwin,
    "pixtral": PixtralTwin,
    "qwen3.5": DeltaTwin,
}
Case = tuple[str, str, Settings, list[dict[str, Any]]]
NONE: tuple[str, Settings, list[dict[str, Any]]] = ("none", {}, [{}])
LIGHT: Settings = {
    "kv": "interval", "kv_keep": 1.0, "kv_floor": 6, "kv_protect": 5, "kv_interval": 9,
}  # fmt: skip
# Ranked by capped attention, of queries that see what follows them
CAPPED: tuple[str, Settings, list[dict[str, Any]]] = (
    *("lightvlm", {"kv": "elastic-cache", "importance": "both", "kv_keep": 1.0}),
    [{"keep": 0.35, "kv_keep": 0.5}],
)
USUAL: list[Case] = [
    ("gemma3:gqa-window", *NONE),
    ("mistral3:gqa", "lightvlm", {"kv_keep": 0.5}, [{"keep": 0.35}]),
    ("paligemma:gemma2-gqa", *CAPPED),
    ("qwen3.5:gqa-linear-first", *NONE),
]
WHOLE: list[Case] = [
    *USUAL,
    ("gemma3:mha-bias-global-first", *NONE),
    ("gemma3:wide-window", "lightvlm", {"kv_keep": 0.5}, [{"keep": 0.35}, {"keep": 1e-6}]),
    ("gemma3:wide-window", "elastic-cache", {"kv_keep": 1.0}, [{"kv_keep": 0.5}]),
    ("gemma3:wide-window", "snapkv", {"kv_keep": 1.0}, [{"kv_keep": 0.3}]),
    ("paligemma:gemma2-gqa", *NONE),
    ("paligemma:gemma2-gqa", "h2o", {"kv_keep": 1.0}, [{"kv_keep": 0.5}]),
    ("paligemma:gemma2-gqa", "snapkv", {"kv_keep": 1.0}, [{"kv_keep": 0.3}]),
    ("paligemma:gemma2-mha-bias-window", *NONE),
    ("paligemma:gemma-mqa", *NONE),
    ("paligemma:gemma-mqa", *CAPPED),
    ("mistral3:gqa", *NONE),
    ("mistral3:gqa", "lightvlm", LIGHT, [{"keep": 0.5, "kv_keep": 0.4}]),
    ("pixtral:mha-layers-tied", *NONE),
    ("pixtral:mha-layers-tied", "elastic-cache", {"kv_keep": 1.0}, [{"kv_keep": 0.5}]),
    ("pixtral:mha-layers-tied", "snapkv", {"kv_keep": 1.0}, [{"kv_keep": 0.3}]),
    ("qwen3.5:mha-linear-last-tied", *NONE),
    ("qwen3.5:gqa-linear-first", "snapkv", {"kv_keep": 1.0}, [{"kv_keep": 0.3}]),
]


@pytest.mark.parametrize("case", WHOLE if whole() else USUAL, ids=lambda case: " ".join(case[:2]))
def test_family(case: Case, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]) -> None:
    name, recipe, settings, calls = case
    twin = TWINS[name.partition(":")[0]](checkpoint(name))
    folder = bundle(name, recipe, *arguments(settings), max_images=2)
    rows = [(text, [image(*shape) for shape in shapes]) for text, shapes in ROWS]
    for ratios in calls:
        own = {"kv_keep": settings.get("kv_keep", 1.0)} | ratios  # as exported where none is given
        answers = compare_steps(
            folder,
            twin,
            lambda own=own: rule_of(recipe, settings, folder, **own),
            rows,
            COUNT,
            **ratios,
        )
        assert len({tuple(answer.tokens) for answer in answers}) > 1


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
