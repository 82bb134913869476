"""One answer on its way: the tokens so far, and when they end."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from lvlm.runtime.generate.answers import FinishReason
from lvlm.runtime.prompt.prompts import Prompt
from lvlm.runtime.sampling.sampler import Forced, Sampler, TokenScore


@dataclass
class Row:
    """State of one prompt. finish_reason: None while it runs.

    ``limit`` is the number of new tokens it may have, ``position`` the true one of the next token.
    """

    prompt: Prompt
    limit: int
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def __post_init__(self) -> None:
        self.position = self.prompt.next_position
        self.sampler: Sampler | Forced
        if self.prompt.forced is None:
            self.sampler = Sampler(
                self.prompt.sampling,
                self.prompt.ids,
                self.prompt.generation,
                self.prompt.structure,
            )
        else:
            self.sampler = Forced(self.prompt.forced)

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is all that is asked of logits."""
        return self.sampler.greedy and self.prompt.logprobs is None

    def choose(self, logits: np.ndarray, eos_ids: Collection[int]) -> int:
        """The next token, from logits [vocabulary], or, of a greedy row, the likeliest token [].
        Raises as Sampler.choose."""
        token = self.sampler.choose(logits) if logits.ndim else self.sampler.take(int(logits))
        if self.prompt.logprobs is not None:
            self.scores.append(TokenScore.of(logits, token, self.prompt.logprobs))
        self.tokens.append(token)
        ends = token in eos_ids and not self.prompt.ignore_eos
        if ends or token in self.prompt.sampling.stop_token_ids:
            self.finish_reason, self.stop_reason = "stop", token
        elif self.sampler.complete:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        return token

    def stop(self, text: str) -> None:
        """A stop string has come."""
        self.finish_reason, self.stop_reason = "stop", text

    @property
    def cut_short(self) -> bool:
        """True where the cache's capacity ended it before its max_new_tokens."""
        short = len(self.tokens) < self.prompt.max_new_tokens
        return self.finish_reason == "length" and short
