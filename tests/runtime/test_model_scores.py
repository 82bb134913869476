"""Model: answers that are given, and how likely they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_tools import intercept
from model_tools import IMAGE, OTHER

import lvlm
from lvlm.core.errors import (
    BackendError,
    CapacityError,
    ParameterError,
)
from lvlm.runtime.model import Model


def test_a_score_is_that_of_the_model_s_own_choice(light: Model) -> None:
    asks = (["Read the top row.", "Hi"], [[IMAGE, OTHER], []])
    options: dict[str, Any] = {"keep": 0.3, "kv_keep": 0.5, "logprobs": 2, "max_new_tokens": 20}
    own = light.generate(*asks, ignore_eos=True, **options)
    answers = [own[0].token_ids, own[1].token_ids[:7]]
    fed = light.score(asks[0], answers, asks[1], stop=("e",), **options)
    for mine, theirs, tokens in zip(fed, own, answers, strict=True):
        assert mine.token_ids == tokens
        assert mine.scores == theirs.scores[: len(tokens)]
        assert mine.finish_reason == "length"
    assert fed[0].text == own[0].text
    assert fed[0].stats.cache_bytes_used == own[0].stats.cache_bytes_used
    alone = light.score(asks[0][1], np.array(answers[1]), keep=0.3, kv_keep=0.5)
    assert alone.token_ids == answers[1]
    assert all(score.top == () for score in alone.scores)
    other = [5] * 7
    assert sum(s.logprob for s in light.score("Hi", other).scores) < sum(
        s.logprob for s in alone.scores
    )


def test_what_cannot_be_scored(light: Model) -> None:
    for wrong in ([], [-1], [10**6], [0.5], "7", 7, None):
        with pytest.raises(ParameterError, match=r"^answer is .*; give token ids, one or more"):
            light.score("Hi", wrong)  # type: ignore[call-overload]
    with pytest.raises(ParameterError, match="2 prompts but 1 answers"):
        light.score(["Hi", "Hello"], [[5]])
    most = light.manifest.capacity.max_text_len
    with pytest.raises(CapacityError, match=f"answer has {most} tokens, but there is room"):
        light.score("Hi", [5] * most)
    assert light.generate("Hi", max_new_tokens=1).token_ids


def test_a_score_of_what_is_not_finite(bundle: Callable[..., Path]) -> None:
    with lvlm.load(bundle("digits-llava", max_images=2)) as model:

        def spoil(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
            outputs["logits"][0, 9] = np.inf

        intercept(model, "decode").after = spoil
        with pytest.raises(BackendError, match="logits contain NaN or infinity"):
            model.score("Hi", [5, 6])
