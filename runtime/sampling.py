"""Choosing the next token from logits, as transformers does: penalty, temperature, top-k, top-p."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

from lvlm.runtime.errors import BackendError, ParameterError
from lvlm.runtime.generation_options import GenerationOptions


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    ``temperature`` 0 (the default) takes the likeliest token; above 0 the logits are divided by it
    and a token is drawn. ``top_k`` draws from the k likeliest (0: all), ``top_p`` from the fewest
    likeliest that together reach that probability. ``repetition_penalty`` above 1 makes tokens of
    the prompt and of the answer less likely, also at temperature 0. ``seed`` makes draws repeatable
    (None: they differ each time).

    Raises ``ParameterError`` for a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @classmethod
    def of(
        cls, options: GenerationOptions, row: int, generation: Mapping[str, Any] | None = None
    ) -> Sampling:
        """For row ``row`` of a call; ``generation`` is what the bundle says (None: nothing). A
        seeded batch's row r draws from seed + r, so that equal prompts differ."""
        says = {
            name: value
            for name, value in (generation or {}).items()
            if name in ("top_k", "top_p", "repetition_penalty") and value is not None
        }
        says |= {
            name: value
            for name in ("top_k", "top_p", "repetition_penalty")
            if (value := getattr(options, name)) is not None
        }
        seed = None if options.seed is None else options.seed + row
        return cls(options.temperature, **says, seed=seed)

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, Real, "0 or above", lambda x: 0 <= x < math.inf)
        _check("top_k", self.top_k, Integral, "a whole number, 0 (all) or above", lambda x: x >= 0)
        _check("top_p", self.top_p, Real, "above 0 and at most 1", lambda x: 0 < x <= 1)
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, Real, "from 0.01 to 100", lambda x: 0.01 <= x <= 100)
        if self.seed is not None:
            _check("seed", self.seed, Integral, "None or a whole number from 0", lambda x: x >= 0)


@dataclass(frozen=True)
class TokenScore:
    """Natural logarithms of probabilities, before temperature and penalties.

    ``top``: the likeliest tokens and theirs, as many as were asked for, the likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: np.ndarray, token: int, count: int) -> TokenScore:
        """From logits [vocabulary]."""
        shifted = logits.astype(np.float64) - logits.max()
        scores = shifted - np.log(np.exp(shifted).sum())
        best = np.argsort(-scores, kind="stable")[:count]
        top = tuple((int(t), float(scores[t])) for t in best)
        return cls(float(scores[token]), top)


class Sampler:
    """Chooses the tokens of one row's answer, and remembers them. For one thread at a time."""

    def __init__(self, params: Sampling, prompt_ids: Sequence[int]) -> None:
        self._params = params
        self._prompt_ids = np.asarray(prompt_ids, np.int64)
        self._seen: npt.NDArray[np.bool_] | None = None  # [vocab]; its size comes with the logits
        self._random = np.random.default_rng(params.seed)

    def choose(self, logits: npt.NDArray[np.floating]) -> int:
        """The next token, from logits [vocab] (taken as float32, left as they are).

        Raises ``BackendError`` if there is NaN or infinity among them.
        """
        scores = np.asarray(logits, np.float32)
        if not np.isfinite(scores).all():
            raise BackendError(
                "logits contain NaN or infinity; the model overflows: use a bundle in float32"
            )
        if self._params.repetition_penalty != 1:
            scores = self._penalised(scores)
        token = int(scores.argmax()) if self._params.temperature == 0 else self._draw(scores)
        if self._seen is not None:
            self._seen[token] = True
        return token

    def _penalised(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if self._seen is None:
            self._seen = np.zeros(scores.size, bool)
            # Embeddings may have rows, and prompts ids, that the logits lack
            self._seen[self._prompt_ids[self._prompt_ids < scores.size]] = True
        penalty = np.float32(self._params.repetition_penalty)
        with np.errstate(over="ignore"):  # clipped below
            changed = np.where(scores < 0, scores * penalty, scores / penalty)
        largest = np.finfo(np.float32).max
        return np.where(self._seen, changed.clip(-largest, largest), scores)

    def _draw(self, scores: npt.NDArray[np.float32]) -> int:
        tokens, probabilities = candidates(scores, self._params)
        reached = probabilities.cumsum()
        # random() is below 1, so that a token of probability 0 is never drawn
        return int(tokens[reached.searchsorted(self._random.random() * reached[-1], side="right")])


def candidates(
    scores: npt.NDArray[np.float32], params: Sampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """What may be drawn from ``scores`` [vocab]: tokens [n] and their weights [n].

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


def _check(
    name: str, value: object, kind: type[Real | Integral], wanted: str, fits: Callable[[Any], bool]
) -> None:
    # NaN fails every comparison; bool is a number to Python, but not to a user
    if not isinstance(value, kind) or isinstance(value, bool) or not fits(value):
        raise ParameterError(f"{name} is {value!r}, but it must be {wanted}")
