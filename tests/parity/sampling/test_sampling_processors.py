"""generation_config.json's part in choosing tokens: as transformers' own logits processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig as Theirs
from transformers import GenerationMixin

from lvlm.core.errors import BackendError, BundleError
from lvlm.runtime.options.generation_config import GenerationConfig
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.sampling.logits_processors import LogitsProcessors
from lvlm.runtime.sampling.sampler import Sampler, candidates
from lvlm.runtime.sampling.settings import Sampling

VOCAB = 12
EOS = (2, 5)
TOKENS = st.integers(0, VOCAB - 1)


class Bare(GenerationMixin):
    """As much of a model as is needed to ask ``generate`` for its processors."""

    class config:  # noqa: N801 - the name is transformers'
        is_encoder_decoder = False


def processors(values: dict[str, Any], prompt: list[int], eos: Sequence[int] = EOS) -> Any:
    """Those that transformers' generate builds for a generation_config.json."""
    config = Theirs(**values, eos_token_id=list(eos))
    config._eos_token_tensor = torch.tensor(eos)
    if config.min_new_tokens is not None:  # as generate does before it builds them
        config.min_length = config.min_new_tokens + len(prompt)
    return Bare()._get_logits_processor(config, len(prompt), torch.tensor([prompt]), device="cpu")


CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.5, 1.3, 7.0]),
        "no_repeat_ngram_size": st.integers(1, 4),
        "bad_words_ids": st.lists(st.lists(TOKENS, min_size=1, max_size=3), min_size=1, max_size=5),
        "min_length": st.integers(0, 12),
        "min_new_tokens": st.integers(0, 6),
        "suppress_tokens": st.lists(st.integers(-1, VOCAB + 2), max_size=3),
        "begin_suppress_tokens": st.lists(TOKENS, max_size=3),
    },
)


@settings(max_examples=examples(300), deadline=None)
@given(values=CONFIGS, prompt=st.lists(TOKENS, min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_greedy_tokens_are_those_of_generate(
    values: dict[str, Any], prompt: list[int], seed: int
) -> None:
    if "min_new_tokens" in values:
        values.pop("min_length", None)  # generate does not look at it then, nor is it exported
    config = GenerationConfig.of(values, EOS)
    sampler = Sampler(Sampling.of(GenerationOptions(), 0, config), prompt, config)
    theirs = processors(values, prompt)
    random, ids = np.random.default_rng(seed), list(prompt)
    for _ in range(8):
        logits = random.integers(-3, 4, VOCAB).astype(np.float32)  # often equal: ties, too
        scores = theirs(torch.tensor([ids]), torch.from_numpy(logits.copy())[None])
        expected = int(scores.argmax())
        assert sampler.choose(logits) == expected
        ids.append(expected)


@settings(max_examples=examples(300), deadline=None)
@given(
    values=CONFIGS,
    said=st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3]),
            "min_new_tokens": st.integers(0, 6),
            "top_k": st.integers(1, VOCAB),
            "top_p": st.sampled_from([0.3, 0.8]),
            "min_p": st.sampled_from([0.0, 0.05, 0.3, 1.0]),
        },
    ),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    stops=st.lists(TOKENS, max_size=2),
    prompt=st.lists(TOKENS, min_size=1, max_size=6),
    seed=st.integers(0, 10**6),
)
def test_what_a_caller_says_is_in_generate_s_order(
    values: dict[str, Any],
    said: dict[str, Any],
    temperature: float,
    stops: list[int],
    prompt: list[int],
    seed: int,
) -> None:
    """The probabilities that generate would draw from, if it were told the same; tokens that stop
    are more of eos_token_id."""
    if "min_new_tokens" in values:
        values.pop("min_length", None)
    words = values.get("bad_words_ids", [])
    stops = [token for token in stops if [token] not in words]  # there, an end is no bad word
    config = GenerationConfig.of(values, EOS)
    options = GenerationOptions(temperature=temperature, stop_token_ids=stops, **said)
    sampling = Sampling.of(options, 0, config)
    ours = LogitsProcessors(sampling, config, prompt)
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0}
    theirs = processors(values | drawing | said, prompt, (*EOS, *stops))
    random, ids = np.random.default_rng(seed), list(prompt)
    for _ in range(6):
        logits = random.normal(0, 2, VOCAB).astype(np.float32)
        scores = theirs(torch.tensor([ids]), torch.from_numpy(logits.copy())[None])
        if bool((scores > -torch.inf).any()):
            found = np.zeros(VOCAB)
            tokens, weights = candidates(logits if ours.idle else ours(logits), sampling)
            found[tokens] = weights / weights.sum()
            np.testing.assert_allclose(found, scores.softmax(-1)[0].numpy(), atol=2e-6)
        ids.append(int(random.integers(VOCAB)))
        ours.chosen(ids[-1])


def test_a_callers_penalty_comes_before_the_checkpoints() -> None:
    config = GenerationConfig(repetition_penalty=100.0)
    logits = np.array([0, 5, 4], np.float32)

    def chosen(options: GenerationOptions) -> int:
        return Sampler(Sampling.of(options, 0, config), [1], config).choose(logits)

    assert chosen(GenerationOptions()) == 2
    assert chosen(GenerationOptions(repetition_penalty=1.0)) == 1


def test_what_is_forbidden_is_never_drawn() -> None:
    config = GenerationConfig(suppress_tokens=(0, 2), begin_suppress_tokens=(3,))
    for seed in range(20):
        sampler = Sampler(Sampling(temperature=5.0, top_k=3, seed=seed), [1], config)
        assert sampler.choose(np.zeros(4, np.float32)) == 1
    nothing = GenerationConfig(suppress_tokens=(0, 1))
    with pytest.raises(BackendError, match="forbids every"):
        Sampler(Sampling(temperature=1.0), [1], nothing).choose(np.zeros(2, np.float32))


def test_the_manifest_has_what_differs_from_the_defaults() -> None:
    assert GenerationConfig().stored() == {}
    config = GenerationConfig(repetition_penalty=1.1, bad_words_ids=((1, 2), (3,)), min_length=4)
    stored = config.stored()
    assert stored == {
        "repetition_penalty": 1.1,
        "bad_words_ids": [[1, 2], [3]],
        "min_length": 4,
    }
    assert GenerationConfig.of(stored) == config


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ({"min_length": -1}, "min_length is -1"),
        ({"no_repeat_ngram_size": True}, "no_repeat_ngram_size"),
        ({"bad_words_ids": [1]}, "bad_words_ids"),
        ({"num_beams": 4}, "num_beams"),
    ],
)
def test_a_manifest_that_does_not_fit(stored: dict[str, Any], named: str) -> None:
    with pytest.raises(BundleError, match=named):
        GenerationConfig.of(stored)
