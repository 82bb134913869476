"""How a caller says which tokens are chosen: against a plain implementation, over whole answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm.core.errors import BackendError
from lvlm.runtime.options.generation_config import GenerationConfig
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.sampling.logits_processors import LogitsProcessors
from lvlm.runtime.sampling.sampler import Forced, Sampler, candidates
from lvlm.runtime.sampling.settings import Sampling

VOCAB = 10
EOS = (2, 5)
TOKENS = st.integers(0, VOCAB - 1)
NUMBERS = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 2.0])


def plain_scores(
    logits: Sequence[float], options: GenerationOptions, prompt: list[int], answer: list[int]
) -> list[float]:
    """What every token is worth, a token at a time, by the options' own words."""
    scores = []
    least = options.min_new_tokens or 0
    for token, logit in enumerate(logits):
        score = logit + (options.logit_bias or {}).get(token, 0.0)
        if options.repetition_penalty is not None and token in prompt + answer:
            penalty = options.repetition_penalty
            score = score * penalty if score < 0 else score / penalty
        score -= options.frequency_penalty * answer.count(token)
        score -= options.presence_penalty if token in answer else 0.0
        if len(answer) < least and token in (*EOS, *options.stop_token_ids):
            score = -math.inf
        scores.append(score)
    return scores


def plain_chances(scores: Sequence[float], options: GenerationOptions) -> list[float]:
    """Probabilities at a temperature: min_p of the likeliest one of those that top_k leaves."""
    least = sorted(scores)[-options.top_k] if options.top_k else -math.inf
    top = max(scores)
    chances = [math.exp((s - top) / options.temperature) if s >= least else 0.0 for s in scores]
    chances = [c if c >= (options.min_p or 0.0) else 0.0 for c in chances]
    return [c / sum(chances) for c in chances]


OPTIONS = st.builds(
    GenerationOptions,
    min_new_tokens=st.none() | st.integers(0, 5),
    repetition_penalty=st.sampled_from([None, 0.5, 1.3]),
    frequency_penalty=NUMBERS,
    presence_penalty=NUMBERS,
    logit_bias=st.none()
    | st.dictionaries(TOKENS, st.sampled_from([-100.0, -1.5, 3.0]), max_size=3),
    stop_token_ids=st.lists(TOKENS, max_size=2),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_k=st.sampled_from([None, 3]),
    min_p=st.sampled_from([None, 0.0, 0.05, 0.4, 1.0]),
)


@settings(max_examples=examples(300), deadline=None)
@given(options=OPTIONS, prompt=st.lists(TOKENS, min_size=1, max_size=5), seed=st.integers(0, 10**6))
def test_scores_and_chances_are_those_of_a_plain_implementation(
    options: GenerationOptions, prompt: list[int], seed: int
) -> None:
    config, random, answer = GenerationConfig(eos_ids=EOS), np.random.default_rng(seed), []
    params = Sampling.of(options, 0, config)
    processors = LogitsProcessors(params, config, prompt)
    for _ in range(8):
        logits = random.normal(0, 2, VOCAB).astype(np.float32)
        before = logits.copy()
        scores = logits if processors.idle else processors(logits)
        expected = plain_scores(before.tolist(), options, prompt, answer)
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(logits, before)
        tokens, weights = candidates(scores, params)
        chances = np.zeros(VOCAB)
        chances[tokens] = weights / weights.sum()
        np.testing.assert_allclose(chances, plain_chances(expected, options), atol=1e-5)
        answer.append(int(random.integers(VOCAB)))
        processors.chosen(answer[-1])


def greedy(options: GenerationOptions, logits: Sequence[float], steps: int) -> list[int]:
    config = GenerationConfig(eos_ids=EOS)
    sampler = Sampler(Sampling.of(options, 0, config), [1], config)
    return [sampler.choose(np.array(logits, np.float32)) for _ in range(steps)]


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, [0, 0, 0, 0, 0]),
        ({"frequency_penalty": 0.6}, [0, 1, 0, 2, 1]),
        ({"presence_penalty": 1.0}, [0, 1, 0, 0, 0]),
        ({"presence_penalty": 2.0}, [0, 1, 2, 0, 0]),
        ({"logit_bias": {3: 2.5}}, [3, 3, 3, 3, 3]),
        ({"logit_bias": {0: -100, 1: -100}, "min_new_tokens": 2}, [3, 3, 2, 2, 2]),
        ({"stop_token_ids": [0], "min_new_tokens": 3}, [1, 1, 1, 0, 0]),
    ],
)
def test_at_temperature_0_too(options: dict[str, Any], tokens: list[int]) -> None:
    assert greedy(GenerationOptions(**options), [2.0, 1.5, 1.0, 0.0], 5) == tokens


NOT_GREEDY: tuple[dict[str, Any], ...] = (
    *({"temperature": 0.5}, {"repetition_penalty": 1.3}, {"frequency_penalty": 0.5}),
    *({"presence_penalty": -0.5}, {"logit_bias": ((3, 1.0),)}, {"min_new_tokens": 2}),
    *({"no_repeat_ngram_size": 2}, {"bad_words_ids": ((4,),)}, {"min_length": 4}),
    *({"suppress_tokens": (4,)}, {"begin_suppress_tokens": (4,)}),
)


@pytest.mark.parametrize("asks", NOT_GREEDY)
def test_what_changes_a_choice_is_not_greedy(asks: dict[str, Any]) -> None:
    """A graph's own choice of the largest logit would not do."""
    known = {field.name for field in dataclasses.fields(Sampling)}
    params = Sampling(**{name: value for name, value in asks.items() if name in known})
    config = GenerationConfig(**{name: value for name, value in asks.items() if name not in known})
    assert not Sampler(params, [1], config).greedy


def test_a_greedy_choice_may_be_a_graphs_own() -> None:
    """Whatever is said of drawing."""
    params = Sampling(top_k=3, top_p=0.5, min_p=0.2, seed=1, stop_token_ids=(4,))
    random, samplers = np.random.default_rng(0), [Sampler(params, [1]) for _ in range(2)]
    assert samplers[0].greedy
    for _ in range(5):
        logits = random.normal(0, 2, VOCAB).astype(np.float32)
        assert samplers[0].choose(logits) == samplers[1].take(int(logits.argmax()))
    for sampler in (samplers[0], Forced([1])):
        with pytest.raises(BackendError, match="logits contain NaN or infinity"):
            sampler.take(-1)
    assert Forced([7]).take(3) == 7


def test_a_bias_is_scaled_as_the_logit_it_is_added_to() -> None:
    """Before the penalty on repetition: 1 + 2 is halved; and before the temperature."""
    options = GenerationOptions(repetition_penalty=2.0, logit_bias={1: 2.0})
    assert greedy(options, [1.75, 1.0], 1) == [0]
    assert greedy(options, [1.25, 1.0], 1) == [1]
    params = Sampling.of(GenerationOptions(temperature=0.1, logit_bias={1: -1.0}), 0)
    scores = LogitsProcessors(params, GenerationConfig(), [0])(np.zeros(2, np.float32))
    _, weights = candidates(scores, params)
    assert weights[1] / weights[0] == pytest.approx(math.exp(-10))


def test_a_length_that_the_caller_says_comes_before_the_checkpoints() -> None:
    config = GenerationConfig(min_length=3, eos_ids=EOS)
    logits = np.array([0, 0, 9], np.float32)

    def chosen(options: GenerationOptions) -> int:
        return Sampler(Sampling.of(options, 0, config), [1], config).choose(logits)

    assert chosen(GenerationOptions()) == 0
    assert chosen(GenerationOptions(min_new_tokens=0)) == 2


@pytest.mark.parametrize(
    ("params", "drawn"),
    [
        (Sampling(temperature=1.0, seed=7), [26, 35, 34, 10, 13, 38, 1, 31, 31, 19, 12, 9]),
        (
            Sampling(temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.3, seed=1),
            [8, 29, 9, 2, 23, 16, 11, 30, 33, 31, 15, 20],
        ),
        (
            Sampling(temperature=2.0, top_p=0.5, seed=2**70),
            [39, 29, 9, 2, 28, 38, 3, 8, 33, 29, 23, 8],
        ),
    ],
)
def test_a_seed_draws_what_it_always_drew(params: Sampling, drawn: list[int]) -> None:
    """Recorded before there was min_p or a penalty on what the answer has."""
    sampler = Sampler(params, [3, 1])
    places = np.arange(40, dtype=np.float32)
    assert [sampler.choose(np.sin(places * (step + 1)) * 3) for step in range(12)] == drawn
