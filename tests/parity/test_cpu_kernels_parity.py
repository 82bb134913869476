"""A bundle answers the same tokens with the library of CPU kernels and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from settings import ASSETS, CACHED

import lvlm
from lvlm.runtime.backends.ort.kernels.kernel_library import KERNELS

IMAGES = [ASSETS / "samples/digits-1.png", ASSETS / "samples/digits-2.png"]
RECIPES = {
    "none": ("none",),
    "lightvlm": CACHED["lightvlm (cached)"],
    "elastic-cache": CACHED["elastic-cache (cached)"],
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_answers_are_those_without_the_library(
    recipe: tuple[str, ...],
    dtype: str,
    bundle: Callable[..., Path],
    kernels: Path,
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
) -> None:
    if dtype == "fp16" and not pytestconfig.getoption("--whole"):
        pytest.skip("more exports: --whole")
    folder = bundle("digits-llava", *recipe, max_images=2, dtype=dtype)

    def answers() -> list[list[int]]:
        with lvlm.load(folder) as model:
            asked = {"max_new_tokens": 48, "temperature": 0.0, "ignore_eos": True}
            both = model.generate(["Read it.", "Read row 0:"], [[i] for i in IMAGES], **asked)
            return [answer.token_ids for answer in both]

    monkeypatch.setenv(KERNELS, "off")
    expected = answers()
    monkeypatch.setenv(KERNELS, str(kernels))
    assert answers() == expected
