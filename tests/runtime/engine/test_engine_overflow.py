"""What is not finite stays with the request that made it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_tools import (
    OTHERS,
    SHORT,
    WAIT,
    answers,
    idle,
    intercept,
    same,
    scheduler,
    short_row,
    submit,
    until,
)
from settings import CACHED

import lvlm
from lvlm.core.errors import BackendError
from lvlm.runtime.engine import Engine, Handle
from lvlm.runtime.generate.answers import Generation


def test_logits_of_one_row_that_are_not_finite(engine: Engine, expected: list[Generation]) -> None:
    decode = intercept(engine, "decode")

    def spoil(inputs: Any, outputs: Any) -> None:
        outputs["logits"][short_row(inputs)] = np.nan

    decode.after = spoil
    nan = pytest.raises(BackendError, match="logits contain NaN")
    with answers(engine, OTHERS, expected), nan:
        submit(engine, SHORT).result(WAIT)


@pytest.mark.parametrize("recipe", ["none", "lightvlm (cached)", "elastic-cache (cached)"])
@pytest.mark.parametrize("when", ["prefill", "decode", "cancelled"])
def test_a_slot_is_clean_after_an_overflow(
    recipe: str, when: str, bundle: Callable[..., Path]
) -> None:
    """Entries that are not finite would spoil whoever comes next: attention gives what lies beyond
    its own entries a weight of 0, and 0 times infinity is not 0."""
    folder = bundle("digits-llava", *CACHED.get(recipe, (recipe,)), max_images=2)
    with lvlm.load(folder) as model:
        one = OTHERS[0].alone(model)
    with Engine(folder, slots=1) as engine:
        reads = "extend" if recipe == "none" else "prefill"
        faulty = intercept(engine, "decode" if when == "decode" else reads)
        handles: list[Handle] = []

        def spoil(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
            for buffer in scheduler(engine).batch.slots.cache.buffers.values():
                buffer[:] = np.inf
            until(lambda: bool(handles))
            if when == "cancelled":
                handles[0].cancel()
            else:
                outputs["logits"][:] = np.nan

        faulty.after = spoil
        handles.append(submit(engine, OTHERS[0]))
        with pytest.raises(lvlm.LvlmError, match="cancelled" if when == "cancelled" else "NaN"):
            handles[0].result(WAIT)
        faulty.after = lambda inputs, outputs: None  # noqa: ARG005
        same(engine.generate(*OTHERS[0].arguments, **OTHERS[0].options), one)
        idle(engine)
