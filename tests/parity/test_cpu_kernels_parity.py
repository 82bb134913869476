"""A bundle answers the same tokens with the library of CPU kernels and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from settings import ASSETS, CACHED

import lvlm
from lvlm.runtime.backends.ort.kernels.kernel_library import KERNELS
from lvlm.runtime.engine import Engine

IMAGES = [ASSETS / "samples/digits-1.png", ASSETS / "samples/digits-2.png"]
ASKED = {"max_new_tokens": 48, "temperature": 0.0, "ignore_eos": True}
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
            both = model.generate(["Read it.", "Read row 0:"], [[i] for i in IMAGES], **ASKED)
            return [answer.token_ids for answer in both]

    monkeypatch.setenv(KERNELS, "off")
    expected = answers()
    monkeypatch.setenv(KERNELS, str(kernels))
    assert answers() == expected


def test_a_prompt_in_chunks_has_the_answer_without_chunks_and_library(
    bundle: Callable[..., Path], kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundle("digits-llava", max_images=2)
    monkeypatch.setenv(KERNELS, "off")
    with lvlm.load(folder) as model:
        expected = model.generate("Read row 0:", IMAGES[:1], **ASKED).token_ids
    monkeypatch.setenv(KERNELS, str(kernels))
    with Engine(folder, slots=1, chunk_tokens=17) as engine:
        assert engine.submit("Read row 0:", IMAGES[:1], **ASKED).result(60).token_ids == expected
