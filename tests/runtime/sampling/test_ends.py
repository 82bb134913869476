"""Tokens that end an answer, or may not: a model's and an engine's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_tools import idle
from model_tools import IMAGE, QUESTION

import lvlm
from lvlm.core.errors import ParameterError
from lvlm.runtime.engine import Engine
from lvlm.runtime.model import Model

Both = tuple[Model, Engine]


@pytest.fixture(scope="module")
def both(bundle: Callable[..., Path]) -> Iterator[Both]:
    folder = bundle("digits-llava", max_images=2)
    with lvlm.load(folder) as model, Engine(folder, slots=2) as engine:
        yield model, engine
        idle(engine)


def test_a_stop_token_ends_the_answer_and_is_no_part_of_it(both: Both) -> None:
    model, _ = both
    whole = model.generate(QUESTION, [IMAGE], max_new_tokens=40)
    # One that is visible text, and comes late enough for text before it
    at = next(
        i
        for i in range(4, len(whole.token_ids))
        if whole.token_ids[i] not in whole.token_ids[:i]
        and (model.tokenizer.visible_token(whole.token_ids[i]) or "").strip("▁")
    )
    stop = whole.token_ids[at]
    for who in both:
        for ignore_eos in (False, True):
            cut = who.generate(
                QUESTION, [IMAGE], stop_token_ids=[stop], max_new_tokens=40, ignore_eos=ignore_eos
            )
            assert cut.token_ids == whole.token_ids[: at + 1]
            assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
            assert cut.text == model.tokenizer.decode(whole.token_ids[:at]).lstrip(" ")
            assert whole.text.startswith(cut.text)
        stream = who.stream(QUESTION, [IMAGE], stop_token_ids=[stop], max_new_tokens=40)
        assert "".join(stream) == cut.text


def test_a_stop_string_that_only_the_stop_token_completes(both: Both) -> None:
    """The token's text is none of the answer's, so the string has not come."""
    model, _ = both
    whole = model.generate(QUESTION, [IMAGE], max_new_tokens=12, ignore_eos=True)
    stop = whole.token_ids[6]
    text = model.tokenizer.decode(whole.token_ids[: whole.token_ids.index(stop) + 1]).lstrip(" ")
    assert model.generate(QUESTION, [IMAGE], stop=[text]).stop_reason == text
    both_given = model.generate(QUESTION, [IMAGE], stop=[text], stop_token_ids=[stop])
    assert both_given.stop_reason == stop
    assert text != both_given.text
    assert text.startswith(both_given.text)


def test_no_end_before_min_new_tokens(both: Both) -> None:
    model, engine = both
    short = model.generate("Hi", max_new_tokens=64)
    assert short.finish_reason == "stop"
    count = len(short.token_ids)
    for who in (model, engine):
        longer = who.generate("Hi", max_new_tokens=64, min_new_tokens=count + 5)
        assert len(longer.token_ids) >= count + 5
        assert longer.token_ids[: count - 1] == short.token_ids[:-1]
        assert not model.tokenizer.eos_ids & set(longer.token_ids[: count + 5 - 1])
        same = who.generate("Hi", max_new_tokens=64, min_new_tokens=count - 1)
        assert same.token_ids == short.token_ids
    most = model.generate("Hi", max_new_tokens=3, min_new_tokens=10)
    assert len(most.token_ids) == 3


def test_a_score_has_no_part_in_them(both: Both) -> None:
    model, _ = both
    answer = model.generate("Hi", max_new_tokens=6, ignore_eos=True).token_ids
    plain = model.score("Hi", answer)
    given = model.score(
        "Hi",
        answer,
        stop_token_ids=answer[:2],
        min_new_tokens=99,
        logit_bias={answer[0]: -100},
        frequency_penalty=2.0,
        presence_penalty=2.0,
        min_p=0.9,
    )
    assert given.token_ids == answer
    assert given.scores == plain.scores
    assert given.text == plain.text


def test_tokens_that_the_bundle_lacks(both: Both) -> None:
    model, engine = both
    vocab = model.manifest.text.vocab
    for who in (model, engine):
        with pytest.raises(ParameterError, match=f"stop_token_ids has token {vocab}; .* below"):
            who.generate("Hi", stop_token_ids=[1, vocab])
        with pytest.raises(ParameterError, match=f"logit_bias has token {vocab}; .* below"):
            who.generate("Hi", logit_bias={vocab: 1.0})
        with pytest.raises(ParameterError, match=r"has token of type int; .* below"):
            who.generate("Hi", stop_token_ids=[10**5000])  # more digits than Python writes
    biased = model.generate("Hi", logit_bias={vocab - 1: 100}, max_new_tokens=3)
    assert biased.token_ids == [vocab - 1] * 3
