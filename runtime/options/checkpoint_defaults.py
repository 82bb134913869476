"""``defaults="model"``: what a call leaves open is as transformers' generate takes it from the
checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lvlm.core.errors import BundleError, ParameterError, shown
from lvlm.runtime.options.generation_config import GenerationConfig
from lvlm.runtime.options.generation_options import GenerationOptions

TOP_K = 50  # generate's, for a file that does not say it
# What generate does and a bundle does not, with the value that changes nothing
NOT_DONE = {"top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


def filled_in(options: GenerationOptions, config: GenerationConfig) -> GenerationOptions:
    """Options with what the caller leaves open, where it is to be the checkpoint's. The rest of
    generation_config.json is honoured in any case (Sampling.of, LogitsProcessors).

    Raises ParameterError where tokens would be drawn in a way that a bundle does not have,
    BundleError for values that mean nothing.
    """
    if options.defaults is None:
        return options
    said = config.sampling
    draws = said.get("do_sample", False)
    if not isinstance(draws, bool):
        raise _meaningless(f"do_sample is {shown(draws)}")
    theirs = {
        "max_new_tokens": said.get("max_new_tokens"),
        "temperature": said.get("temperature", 1.0) if draws else 0.0,
        "top_k": said.get("top_k", config.top_k or TOP_K),
        "min_p": said.get("min_p"),
    }
    left: dict[str, Any] = {n: v for n, v in theirs.items() if getattr(options, n) is None}
    try:
        options = replace(options, **left)
    except ParameterError as error:  # the caller's own have been read before
        raise _meaningless(str(error).partition(";")[0]) from None
    if options.temperature:
        _check_done(said)
    return options


def _check_done(said: Mapping[str, Any]) -> None:
    for name, idle in NOT_DONE.items():
        value = said.get(name)
        if value is not None and value != idle:
            raise ParameterError(
                f"the checkpoint draws with {name} = {shown(value)}, which a bundle does not do; "
                "leave defaults='model' (--defaults) out and say temperature, top_p, …"
            )


def _meaningless(what: str) -> BundleError:
    return BundleError(f"the checkpoint's generation_config.json: {what}; say it in the call")
