"""Choosing the next token from logits, as transformers does: temperature, top-k, top-p, min-p."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lvlm.core.errors import BackendError
from lvlm.runtime.options.generation_config import GenerationConfig
from lvlm.runtime.sampling.logits_processors import LogitsProcessors
from lvlm.runtime.sampling.settings import Sampling
from lvlm.runtime.sampling.structure import Structure

OVERFLOW = "logits contain NaN or infinity; the model overflows: use a bundle in float32"


@dataclass(frozen=True)
class TokenScore:
    """Score of a token: natural logarithms of probabilities, before temperature, penalties and
    structure.

    Args:
        logprob: that of the token.
        top: the likeliest tokens and theirs, as many as were asked for, the likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: np.ndarray, token: int, count: int) -> TokenScore:
        """Score a token.

        Args:
            logits: of any floating dtype [vocabulary].
            token: its id.
            count: how many of the likeliest to tell of.

        Returns:
            TokenScore, computed in float64.
        """
        shifted = logits.astype(np.float64) - logits.max()
        scores = shifted - np.log(np.exp(shifted).sum())
        best = np.argsort(-scores, kind="stable")[:count] if count else ()
        top = tuple((int(t), float(scores[t])) for t in best)
        return cls(float(scores[token]), top)


class Sampler:
    """Chooses the tokens of one row's answer, and remembers them. For one thread at a time.

    ``config`` is what the checkpoint's generation_config.json says, of which the penalty is already
    in ``params``; the default changes nothing. ``structure``: what the answer must be.
    """

    def __init__(
        self,
        params: Sampling,
        prompt_ids: Sequence[int],
        config: GenerationConfig | None = None,
        structure: Structure | None = None,
    ) -> None:
        self._params = params
        self._place = None if structure is None else structure.begin()
        self._processors = LogitsProcessors(params, config or GenerationConfig(), prompt_ids)
        self._random = np.random.default_rng(params.seed)

    def choose(self, logits: npt.NDArray[np.floating]) -> int:
        """The next token, from logits [vocab] (taken as float32, left as they are).

        Raises ``BackendError`` if there is NaN or infinity among them, ``ParameterError`` where
        the structure takes too much work to follow.
        """
        given = scores = np.asarray(logits, np.float32)
        check_finite(scores)
        if not self._processors.idle:
            scores = self._processors(scores)
        if self._place is not None:
            scores = self._place.masked(scores, given)
        token = int(scores.argmax()) if self._params.temperature == 0 else self._draw(scores)
        return self._chosen(token)

    @property
    def greedy(self) -> bool:
        """True where ``choose`` is no more than the index of the largest logit: ``take`` does it
        then, too."""
        return self._params.temperature == 0 and self._processors.idle and self._place is None

    def take(self, best: int) -> int:
        """The next token where a graph has chosen it: -1 where its logits are not all finite.
        Raises as ``choose``."""
        check_chosen(best)
        return self._chosen(best)

    def _chosen(self, token: int) -> int:
        self._processors.chosen(token)
        if self._place is not None:
            self._place.chosen(token)
        return token

    @property
    def complete(self) -> bool:
        """True once the structure is complete, and nothing may follow."""
        return self._place is not None and self._place.complete

    def _draw(self, scores: npt.NDArray[np.float32]) -> int:
        if scores.max() == -np.inf:
            raise BackendError(
                "generation_config.json, or min_new_tokens with stop_token_ids, forbids every "
                "token; nothing can be drawn"
            )
        tokens, probabilities = candidates(scores, self._params)
        reached = probabilities.cumsum()
        # random() is below 1, so that a token of probability 0 is never drawn
        return int(tokens[reached.searchsorted(self._random.random() * reached[-1], side="right")])


class Forced:
    """A sampler's stand-in: the tokens of an answer that is given."""

    complete = False
    greedy = True

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = iter(tokens)

    def choose(self, logits: npt.NDArray[np.floating]) -> int:
        """The next one, whatever the logits [vocab] say. Raises as Sampler.choose."""
        check_finite(logits)
        return next(self._tokens)

    def take(self, best: int) -> int:
        """The next one, likewise. Raises as Sampler.take."""
        check_chosen(best)
        return next(self._tokens)


def check_finite(logits: npt.NDArray[np.floating]) -> None:
    """Raises ``BackendError`` if there is NaN or infinity among logits [vocab]."""
    if not np.isfinite(logits).all():
        raise BackendError(OVERFLOW)


def check_chosen(best: int) -> None:
    """Raises ``BackendError`` as ``check_finite`` if a graph that chooses has found no token."""
    if best < 0:
        raise BackendError(OVERFLOW)


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
    if params.min_p > 0:
        keep = weights >= params.min_p * weights.max()
        tokens, weights = tokens[keep], weights[keep]
    return tokens, weights
