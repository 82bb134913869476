"""Settings by which the tokens of one answer are chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lvlm.runtime.options.generation_config import GenerationConfig
from lvlm.runtime.options.generation_options import GenerationOptions


@dataclass(frozen=True)
class Sampling:
    """Settings by which tokens are chosen.

    ``temperature`` 0 (the default) takes the likeliest token; above 0 the logits are divided by it
    and a token is drawn. ``top_k`` draws from the k likeliest (0: all), ``top_p`` from the fewest
    likeliest that together reach that probability, ``min_p`` from those at least so many times as
    likely as the likeliest. ``seed`` makes draws repeatable (None: they differ each time).

    At temperature 0 as well: ``repetition_penalty`` above 1 makes tokens of the prompt and of the
    answer less likely, ``frequency_penalty`` is taken from a token's logit for each time that the
    answer has it, ``presence_penalty`` once; ``logit_bias`` are tokens and what is added to their
    logits. Before ``min_new_tokens`` (None: as the checkpoint says) nothing that ends a text is
    chosen, ``stop_token_ids`` neither. Values are checked where they come from: GenerationOptions,
    GenerationConfig.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    def fork(self, number: int) -> Sampling:
        """Settings of another answer to the same prompt."""
        return replace(self, seed=None if self.seed is None else self.seed + number)

    @classmethod
    def of(
        cls, options: GenerationOptions, row: int, config: GenerationConfig | None = None
    ) -> Sampling:
        """Settings of row ``row`` of a call: what the caller says, then what the checkpoint does. A
        seeded batch's row r draws from seed + r * n, so that equal prompts differ."""
        config = config or GenerationConfig()
        penalty, top_k, top_p = options.repetition_penalty, options.top_k, options.top_p
        return cls(
            temperature=options.temperature or 0.0,
            top_k=config.top_k if top_k is None else top_k,
            top_p=config.top_p if top_p is None else top_p,
            repetition_penalty=config.repetition_penalty if penalty is None else penalty,
            seed=None if options.seed is None else options.seed + row * options.n,
            min_p=options.min_p or 0.0,
            frequency_penalty=options.frequency_penalty,
            presence_penalty=options.presence_penalty,
            logit_bias=tuple((options.logit_bias or {}).items()),
            min_new_tokens=options.min_new_tokens,
            stop_token_ids=tuple(options.stop_token_ids),
        )
