"""Choosing the next token from logits, as transformers does: temperature, top-k, top-p."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lvlm.core.errors import BackendError
from lvlm.runtime.options.generation_config import GenerationConfig
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.sampling.logits_processors import LogitsProcessors


@dataclass(frozen=True)
class Sampling:
    """Settings by which tokens are chosen.

    ``temperature`` 0 (the default) takes the likeliest token; above 0 the logits are divided by it
    and a token is drawn. ``top_k`` draws from the k likeliest (0: all), ``top_p`` from the fewest
    likeliest that together reach that probability. ``repetition_penalty`` above 1 makes tokens of
    the prompt and of the answer less likely, also at temperature 0. ``seed`` makes draws repeatable
    (None: they differ each time). Values are checked where they come from: GenerationOptions,
    GenerationConfig.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @classmethod
    def of(
        cls, options: GenerationOptions, row: int, config: GenerationConfig | None = None
    ) -> Sampling:
        """Settings of row ``row`` of a call: what the caller says, then what the checkpoint does. A
        seeded batch's row r draws from seed + r, so that equal prompts differ."""
        config = config or GenerationConfig()
        penalty, top_k, top_p = options.repetition_penalty, options.top_k, options.top_p
        return cls(
            options.temperature,
            config.top_k if top_k is None else top_k,
            config.top_p if top_p is None else top_p,
            config.repetition_penalty if penalty is None else penalty,
            None if options.seed is None else options.seed + row,
        )


@dataclass(frozen=True)
class TokenScore:
    """Natural logarithms of probabilities, before temperature and penalties.

    ``top``: the likeliest tokens and theirs, as many as were asked for, the likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: np.ndarray, token: int, count: int) -> TokenScore:
        """Scores from logits [vocabulary]."""
        shifted = logits.astype(np.float64) - logits.max()
        scores = shifted - np.log(np.exp(shifted).sum())
        best = np.argsort(-scores, kind="stable")[:count] if count else ()
        top = tuple((int(t), float(scores[t])) for t in best)
        return cls(float(scores[token]), top)


class Sampler:
    """Chooses the tokens of one row's answer, and remembers them. For one thread at a time.

    ``config`` is what the checkpoint's generation_config.json says, of which the penalty is already
    among ``params``; the default changes nothing.
    """

    def __init__(
        self,
        params: Sampling,
        prompt_ids: Sequence[int],
        config: GenerationConfig | None = None,
    ) -> None:
        self._params = params
        config = replace(
            config or GenerationConfig(), repetition_penalty=float(params.repetition_penalty)
        )
        self._processors = LogitsProcessors(config, prompt_ids)
        self._random = np.random.default_rng(params.seed)

    def choose(self, logits: npt.NDArray[np.floating]) -> int:
        """The next token, from logits [vocab] (taken as float32, left as they are).

        Raises ``BackendError`` if there is NaN or infinity among them.
        """
        scores = np.asarray(logits, np.float32)
        check_finite(scores)
        if not self._processors.idle:
            scores = self._processors(scores)
        token = int(scores.argmax()) if self._params.temperature == 0 else self._draw(scores)
        self._processors.chosen(token)
        return token

    def _draw(self, scores: npt.NDArray[np.float32]) -> int:
        if scores.max() == -np.inf:
            raise BackendError("generation_config.json forbids every token; nothing can be drawn")
        tokens, probabilities = candidates(scores, self._params)
        reached = probabilities.cumsum()
        # random() is below 1, so that a token of probability 0 is never drawn
        return int(tokens[reached.searchsorted(self._random.random() * reached[-1], side="right")])


class Forced:
    """A sampler's stand-in: the tokens of an answer that is given."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = iter(tokens)

    def choose(self, logits: npt.NDArray[np.floating]) -> int:
        """The next one, whatever the logits [vocab] say. Raises as Sampler.choose."""
        check_finite(logits)
        return next(self._tokens)


def check_finite(logits: npt.NDArray[np.floating]) -> None:
    """Raises ``BackendError`` if there is NaN or infinity among logits [vocab]."""
    if not np.isfinite(logits).all():
        raise BackendError(
            "logits contain NaN or infinity; the model overflows: use a bundle in float32"
        )


def candidates(
    scores: npt.NDArray[np.float32], params: Sampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Candidates to draw from ``scores`` [vocab]: tokens [n] and their weights [n].

    The temperature is above 0; the weights do not add up to 1. Tokens that tie with the k-th
    likeliest stay in, as in transformers.
    """
    tokens = np.arange(scores.size)
    if 0 < params.top_k < scores.size:
        kth = np.partition(scores, -params.top_k)[-params.top_k]
        tokens = np.flatnonzero(scores >= kth)
    # The largest goes first, so that no temperature is small enough to overflow
    shifted = scores[tokens].astype(np.float64) - scores.max()
    with np.errstate(over="ignore"):
        weights = np.exp(shifted / params.temperature)
    if params.top_p < 1:
        order = np.argsort(weights, kind="stable")
        below = weights[order].cumsum() / weights.sum()
        keep = below > 1 - params.top_p
        keep[-1] = True  # rounding must not leave nothing
        tokens, weights = tokens[order[keep]], weights[order[keep]]
    return tokens, weights
