"""defaults="model": drawn as generate draws that is told the same and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig as Theirs
from transformers import GenerationMixin

from lvlm.core.errors import BundleError, ParameterError
from lvlm.export.families.parts.generation_file import honoured
from lvlm.runtime.options.checkpoint_defaults import NOT_DONE, filled_in
from lvlm.runtime.options.generation_config import GenerationConfig
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.sampling.logits_processors import LogitsProcessors
from lvlm.runtime.sampling.sampler import candidates
from lvlm.runtime.sampling.settings import Sampling

VOCAB = 70  # more than top_k is where nobody says it
EOS = (2, 5)
DRAWING: dict[str, Any] = {
    "temperature": st.sampled_from([0.3, 1.0, 2.0]),
    "top_k": st.sampled_from([0, 3, 60]),
    "top_p": st.sampled_from([0.3, 0.8, 1.0]),
    "min_p": st.sampled_from([0.0, 0.05, 0.3]),
    "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3]),
    "max_new_tokens": st.integers(1, 40),
}


class Bare(GenerationMixin):
    """As much of a model as is needed to ask ``generate`` how it would choose tokens."""

    class config:  # noqa: N801 - the name is transformers'
        is_encoder_decoder = False

        @staticmethod
        def _get_generation_parameters() -> dict[str, Any]:
            return {}

    def __init__(self, file: dict[str, Any]) -> None:
        self.generation_config = Theirs(**file, eos_token_id=list(EOS))

    def told(self, said: dict[str, Any]) -> Any:
        config, _ = self._prepare_generation_config(None, **said)
        config._eos_token_tensor = torch.tensor(EOS)
        return config


def ours(file: dict[str, Any], said: dict[str, Any]) -> tuple[GenerationOptions, GenerationConfig]:
    stored = honoured(Theirs(**file), Path("checkpoint"))
    config = GenerationConfig.of(stored, EOS)
    return filled_in(GenerationOptions(defaults="model", **said), config), config


@settings(max_examples=examples(300), deadline=None)
@given(
    file=st.fixed_dictionaries({}, optional=DRAWING | {"do_sample": st.booleans()}),
    said=st.fixed_dictionaries({}, optional=DRAWING),
    seed=st.integers(0, 10**6),
)
def test_probabilities_are_those_of_generate(
    file: dict[str, Any], said: dict[str, Any], seed: int
) -> None:
    options, config = ours(file, said)
    sampling = Sampling.of(options, 0, config)
    bare = Bare(file)
    told = bare.told(said | ({"do_sample": True} if "temperature" in said else {}))
    assert (sampling.temperature > 0) == told.do_sample
    assert options.max_new_tokens == told.max_new_tokens
    prompt = [1, 7, 60]
    theirs = bare._get_logits_processor(told, 3, torch.tensor([prompt]), device="cpu")
    logits = np.random.default_rng(seed).normal(0, 1, VOCAB).astype(np.float32)
    expected = theirs(torch.tensor([prompt]), torch.from_numpy(logits.copy())[None])[0]
    processors = LogitsProcessors(sampling, config, prompt)
    scores = logits if processors.idle else processors(logits)
    if sampling.temperature == 0:
        np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-6)
        return
    tokens, weights = candidates(scores, sampling)
    found = np.zeros(VOCAB)
    found[tokens] = weights / weights.sum()
    np.testing.assert_allclose(found, expected.softmax(-1).numpy(), atol=2e-6)


def test_a_greedy_call_stays_one() -> None:
    file = {"do_sample": True, "temperature": 0.7}
    assert ours(file, {"temperature": 0})[0].temperature == 0
    assert ours(file | {"typical_p": 0.5}, {"temperature": 0})[0].temperature == 0
    assert ours({"temperature": 0.7}, {})[0].temperature == 0


@pytest.mark.parametrize("name", NOT_DONE)
def test_what_a_bundle_does_not_do_is_refused_by_name(name: str) -> None:
    file = {"do_sample": True, name: 0.5}
    with pytest.raises(ParameterError, match=f"draws with {name} = 0.5.*; leave defaults="):
        ours(file, {})
    assert ours(file | {"do_sample": False}, {})[0].temperature == 0
    asked = GenerationOptions(temperature=0.5)
    config = GenerationConfig.of(honoured(Theirs(**file), Path("checkpoint")))
    assert filled_in(asked, config) is asked


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
        ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot'"),
        ({"min_p": 2}, "min_p is 2"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"top_k": [1]}, r"top_k is \[1\]"),
    ],
)
def test_values_that_mean_nothing(sampling: dict[str, Any], said: str) -> None:
    config = GenerationConfig(sampling=sampling)
    with pytest.raises(BundleError, match=rf"generation_config.json: {said}; say it"):
        filled_in(GenerationOptions(defaults="model"), config)
    assert filled_in(GenerationOptions(), config) == GenerationOptions()
