"""Model: streams, what stops an answer, seeds."""

from __future__ import annotations

import time
from typing import Any

import pytest
from model_tools import IMAGE, QUESTION

from lvlm.core.errors import (
    BackendError,
    ParameterError,
)
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.model import Model
from lvlm.runtime.sampling.sampler import Sampler


def test_which_stop(light: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A special token is matched by its id, a text by what is decoded."""
    tokens = iter([])
    monkeypatch.setattr(Sampler, "choose", lambda self, logits: next(tokens))  # noqa: ARG005

    def answer(*chosen: int, **options: Any) -> Generation:
        nonlocal tokens
        tokens = iter(chosen)
        return light.generate("Hi", **options)

    end = light.tokenizer.token_id("</s>")
    found = answer(20, 21, end, ignore_eos=True, stop=["</s>"])
    assert (found.token_ids, found.finish_reason, found.stop_reason) == (
        [20, 21, end],
        "stop",
        "</s>",
    )
    text = found.text
    found = answer(20, 21, end)
    assert (found.text, found.finish_reason, found.stop_reason) == (text, "stop", end)
    found = answer(20, 21, max_new_tokens=2)
    assert (found.text, found.finish_reason, found.stop_reason) == (text, "length", None)
    found = answer(20, 21, 20, 21, stop=[text[-1:]])
    assert (found.finish_reason, found.stop_reason) == ("stop", text[-1:])
    with pytest.raises(ParameterError, match="special token '</s>' and more"):
        light.stream("Hi", stop=["</s> and"])


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0, "seed": 3}], ids=["greedy", "drawn"])
def test_pieces_of_a_stream_are_the_text(light: Model, options: dict[str, Any]) -> None:
    answer = light.generate(QUESTION, [IMAGE], max_new_tokens=40, **options)
    stream = light.stream(QUESTION, [IMAGE], max_new_tokens=40, **options)
    assert stream.result is None
    pieces = list(stream)
    assert len(pieces) > 3
    assert all(pieces)
    assert "".join(pieces) == answer.text
    assert stream.result is not None
    assert stream.result.token_ids == answer.token_ids
    assert stream.result.text == answer.text


def test_stop_strings_cut_the_answer(light: Model) -> None:
    whole = light.generate(QUESTION, [IMAGE], max_new_tokens=40)
    for stop in (whole.text[9:14], whole.text[3:4], [whole.text[12:20], "nowhere in it"]):
        first = stop if isinstance(stop, str) else stop[0]
        answer = light.generate(QUESTION, [IMAGE], max_new_tokens=40, stop=stop)
        assert answer.text == whole.text[: whole.text.index(first)]
        assert answer.finish_reason == "stop"
        assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
        assert len(answer.token_ids) < len(whole.token_ids)
        stream = light.stream(QUESTION, [IMAGE], max_new_tokens=40, stop=stop)
        assert "".join(stream) == answer.text
    unstopped = light.generate(QUESTION, [IMAGE], max_new_tokens=40, stop=["nowhere in it"])
    assert unstopped.text == whole.text


def test_seed_repeats_draws(light: Model) -> None:
    drawn: dict[str, Any] = {"temperature": 5.0, "max_new_tokens": 12}
    first = light.generate(QUESTION, seed=7, **drawn).token_ids
    assert light.generate(QUESTION, seed=7, **drawn).token_ids == first
    assert light.generate(QUESTION, seed=8, **drawn).token_ids != first
    assert light.generate(QUESTION, **drawn).token_ids != first
    # Equal prompts of a batch differ: row r draws with seed + r.
    rows = light.generate([QUESTION, QUESTION], seed=7, **drawn)
    assert rows[0].token_ids == first
    assert rows[1].token_ids == light.generate(QUESTION, seed=8, **drawn).token_ids


def test_times_of_a_stream(light: Model) -> None:
    """One for each token, whether or not its text is final."""
    began = time.perf_counter()
    with light.stream(QUESTION, [IMAGE], max_new_tokens=9, ignore_eos=True) as stream:
        assert stream.token_times == []
        next(stream)
        assert len(stream.token_times) > 0
        list(stream)
    times = [began, *stream.token_times, time.perf_counter()]
    assert times == sorted(times)
    assert len(times) == 11


def test_a_second_call_is_refused_until_the_stream_ends(light: Model) -> None:
    stream = light.stream(QUESTION, [IMAGE], max_new_tokens=20)
    light.generate(QUESTION, max_new_tokens=1)  # nothing has begun yet
    next(iter(stream))
    for call in (
        lambda: light.generate("Hi"),
        lambda: list(light.stream("Hi")),
    ):
        with pytest.raises(BackendError, match="answering another call"):
            call()
    stream.close()
    assert stream.result is None
    assert light.generate("Hi", max_new_tokens=1).token_ids
