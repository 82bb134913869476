"""Choosing tokens: the same candidates and probabilities as transformers' logits processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lvlm.core.errors import BackendError
from lvlm.runtime.sampling.sampler import Sampler, candidates
from lvlm.runtime.sampling.settings import Sampling

VOCAB = 40


def random_logits(seed: int, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, VOCAB).astype(np.float32)


def theirs(logits: np.ndarray, params: Sampling) -> np.ndarray:
    """Probabilities [vocab] by transformers' warpers, in the order of its generate."""
    ids, scores = torch.zeros(1, 0, dtype=torch.long), torch.from_numpy(logits)[None]
    scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(ids, scores)
    return scores.softmax(-1)[0].numpy()


def ours(logits: np.ndarray, params: Sampling) -> np.ndarray:
    tokens, weights = candidates(logits, params)
    probabilities = np.zeros(logits.size)
    probabilities[tokens] = weights / weights.sum()
    return probabilities


@settings(max_examples=examples(200), deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.sampled_from([0.01, 0.3, 0.5, 0.77, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
)
def test_probabilities_equal_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = random_logits(seed)
    np.testing.assert_allclose(ours(logits, params), theirs(logits, params), atol=2e-6)


def test_ties_at_top_k_stay_in() -> None:
    logits = np.array([1, 2, 3, 2, 0], np.float32)
    params = Sampling(temperature=1.0, top_k=2)
    assert sorted(candidates(logits, params)[0]) == [1, 2, 3]
    np.testing.assert_allclose(ours(logits, params), theirs(logits, params), atol=1e-6)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    for top_p, kept in [
        (0.4, [1]),
        (0.51, [1, 3]),
        (0.74, [1, 3]),
        (0.8, [1, 2, 3]),
        (0.95, [0, 1, 2, 3]),
    ]:
        assert sorted(candidates(logits, Sampling(temperature=1.0, top_p=top_p))[0]) == kept


@settings(max_examples=examples(100), deadline=None)
@given(
    seed=st.integers(0, 10**6),
    penalty=st.sampled_from([0.5, 1.1, 1.3, 7.0]),
    prompt=st.lists(st.integers(0, VOCAB + 3), max_size=8),
)
def test_greedy_with_penalty_equals_transformers(
    seed: int, penalty: float, prompt: list[int]
) -> None:
    sampler = Sampler(Sampling(repetition_penalty=penalty), prompt)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    ids = list(prompt)
    for step in range(6):
        logits = random_logits(seed + step % 2)  # the same logits again: what was chosen must count
        scores = torch.from_numpy(logits.copy())[None]
        expected = int(processor(torch.tensor([ids], dtype=torch.long), scores).argmax())
        assert sampler.choose(logits) == expected
        ids.append(expected)


def test_greedy_takes_the_lowest_of_equals_and_leaves_the_logits() -> None:
    logits = np.array([0, 5, 1, 5], np.float32)
    before = logits.copy()
    assert Sampler(Sampling(), []).choose(logits) == 1
    assert Sampler(Sampling(repetition_penalty=2.0), [1]).choose(logits) == 3
    np.testing.assert_array_equal(logits, before)


def test_half_precision_logits_are_taken() -> None:
    assert Sampler(Sampling(), []).choose(np.array([0, 2, 1], np.float16)) == 1


def draws(params: Sampling, count: int, logits: np.ndarray) -> list[int]:
    sampler = Sampler(params, [])
    return [sampler.choose(logits) for _ in range(count)]


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    seen = np.bincount(draws(Sampling(temperature=1.0, seed=0), 5_000, logits), minlength=4)
    np.testing.assert_allclose(seen / 5_000, [0.1, 0.2, 0.3, 0.4], atol=0.03)
    seen = np.bincount(
        draws(Sampling(temperature=1.0, top_k=2, seed=0), 5_000, logits), minlength=4
    )
    np.testing.assert_allclose(seen / 5_000, [0, 0, 3 / 7, 4 / 7], atol=0.03)


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    logits = np.zeros(VOCAB, np.float32)
    seeded = Sampling(temperature=1.0, seed=7)
    assert draws(seeded, 30, logits) == draws(seeded, 30, logits)
    assert draws(seeded, 30, logits) != draws(Sampling(temperature=1.0, seed=8), 30, logits)
    assert draws(Sampling(temperature=1.0), 30, logits) != draws(
        Sampling(temperature=1.0), 30, logits
    )


@settings(max_examples=examples(100), deadline=None)
@given(
    logits=st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=8),
    temperature=st.sampled_from([5e-324, 1e-30, 1e-3, 1.0, 1e30]),
    top_k=st.integers(0, 9),
    top_p=st.sampled_from([1e-17, 0.5, 1.0]),
    min_p=st.sampled_from([0.0, 5e-324, 1.0]),
    penalty=st.sampled_from([0.01, 1.0, 100.0]),
)
def test_extreme_values_give_a_token_of_the_vocabulary(
    logits: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
) -> None:
    params = Sampling(temperature, top_k, top_p, penalty, seed=0, min_p=min_p)
    token = Sampler(params, [0]).choose(np.array(logits, np.float32))
    assert 0 <= token < len(logits)
    if temperature < 1e-20 and penalty == 1:
        assert logits[token] == max(logits)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(bad: float, temperature: float) -> None:
    with pytest.raises(BackendError, match="NaN or infinity"):
        Sampler(Sampling(temperature=temperature), []).choose(np.array([0, bad, 1], np.float32))
