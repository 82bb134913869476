"""Logits processors: generation_config.json's as transformers has them, and a caller's own.

Order and meaning are those of ``generate``: penalty, n-grams, bad words, shortest length, tokens
that are suppressed. Source: transformers/generation/logits_process.py. A bias comes before all of
them; penalties on what the answer has come after that on repetition, as in vLLM, and are defined as
in OpenAI's API: logit - frequency_penalty * count - presence_penalty * (count > 0).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lvlm.runtime.options.generation_config import GenerationConfig
from lvlm.runtime.sampling.settings import Sampling

Scores = npt.NDArray[np.float32]


class LogitsProcessors:
    """Logits processors of one answer. It remembers what was chosen, so that a step's work does not
    grow.

    ``idle``: nothing is ever changed.
    """

    def __init__(
        self, params: Sampling, config: GenerationConfig, prompt_ids: Sequence[int]
    ) -> None:
        """``prompt_ids`` with every image token, as they enter prefill. The penalty on repetition
        is that of ``params``."""
        self._params, self._config = params, config
        # A caller's length takes the place of both of the file's, as in generate
        asked = params.min_new_tokens
        self._min_length = config.min_length if asked is None else 0
        self._min_new_tokens = config.min_new_tokens if asked is None else asked
        self._ends = {*config.eos_ids, *params.stop_token_ids}
        self.idle = not any(
            (
                params.logit_bias,
                params.repetition_penalty != 1,
                params.frequency_penalty,
                params.presence_penalty,
                config.no_repeat_ngram_size,
                config.bad_words_ids,
                self._min_length,
                self._min_new_tokens,
                config.suppress_tokens,
                config.begin_suppress_tokens,
            )
        )
        self._prompt = len(prompt_ids)
        self._ids = [int(i) for i in prompt_ids]
        # Both [vocab], whose size comes with the logits
        self._seen: npt.NDArray[np.bool_] | None = None  # in prompt or answer
        self._counts: npt.NDArray[np.float32] | None = None  # in the answer
        ends = {(token,) for token in config.eos_ids}  # a bad word may not be the end of text
        self._bad_words = [word for word in config.bad_words_ids if word and word not in ends]
        self._followers: dict[tuple[int, ...], set[int]] = {}  # of each n-gram's beginning
        for end in range(1, len(self._ids) + 1):
            self._note_ngram(end)

    def __call__(self, scores: Scores) -> Scores:
        """Logits [vocab] as they are to be chosen from; forbidden ones are -inf."""
        params, config, new = self._params, self._config, len(self._ids) - self._prompt
        if params.logit_bias:
            scores = self._biased(scores)
        if params.repetition_penalty != 1:
            scores = self._penalised(scores)
        if params.frequency_penalty or params.presence_penalty:
            scores = self._less_of_the_same(scores)
        banned = set(config.suppress_tokens)
        if config.no_repeat_ngram_size:
            banned |= self._followers.get(self._last(config.no_repeat_ngram_size - 1), set())
        banned |= {word[-1] for word in self._bad_words if self._last(len(word) - 1) == word[:-1]}
        if len(self._ids) < self._min_length or new < self._min_new_tokens:
            banned |= self._ends
        if new == 0:
            banned |= set(config.begin_suppress_tokens)
        inside = [token for token in banned if 0 <= token < scores.size]
        if inside:
            scores = scores.copy()
            scores[inside] = -np.inf
        return scores

    def chosen(self, token: int) -> None:
        """The answer's next token."""
        self._ids.append(token)
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        self._note_ngram(len(self._ids))

    def _last(self, count: int) -> tuple[int, ...]:
        """The last tokens, all if there are fewer."""
        return tuple(self._ids[max(len(self._ids) - count, 0) :])

    def _note_ngram(self, end: int) -> None:
        size = self._config.no_repeat_ngram_size
        if size and end >= size:
            beginning = tuple(self._ids[end - size : end - 1])
            self._followers.setdefault(beginning, set()).add(self._ids[end - 1])

    def _biased(self, scores: Scores) -> Scores:
        scores = scores.copy()
        for token, bias in self._params.logit_bias:
            scores[token] += np.float32(bias)
        return scores

    def _less_of_the_same(self, scores: Scores) -> Scores:
        if self._counts is None:  # nothing was chosen yet
            self._counts = np.zeros(scores.size, np.float32)
        often, once = self._params.frequency_penalty, self._params.presence_penalty
        there = self._counts > 0
        return scores - np.float32(often) * self._counts - np.float32(once) * there

    def _penalised(self, scores: Scores) -> Scores:
        if self._seen is None:
            self._seen = np.zeros(scores.size, bool)
            # Embeddings may have rows, and prompts ids, that the logits lack
            ids = np.asarray(self._ids, np.int64)
            self._seen[ids[ids < scores.size]] = True
        penalty = np.float32(self._params.repetition_penalty)
        with np.errstate(over="ignore"):  # clipped below
            changed = np.where(scores < 0, scores * penalty, scores / penalty)
        largest = np.finfo(np.float32).max
        return np.where(self._seen, changed.clip(-largest, largest), scores)
