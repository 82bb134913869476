"""Answers of a call, what they took, and the stream of their pieces."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from lvlm.runtime.media.prepared_image import Box
from lvlm.runtime.sampling.sampler import TokenScore

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Stats:
    """Statistics of one answer. Times cover the whole batch; bytes are of its cache.

    tokens_per_layer entered each block in prefill, kept_per_layer of them stayed in its cache;
    image_tokens of the encoded_image_tokens got to the language model.
    An engine also tells how long a request waited, and how many of its prompt's tokens lay in the
    cache already; its times are those of the steps that the request took part in.
    """

    prompt_tokens: int
    image_tokens: int
    new_tokens: int
    tokens_per_layer: tuple[int, ...]
    image_tokens_per_layer: tuple[int, ...]
    kept_per_layer: tuple[int, ...]
    vision_ms: float
    prefill_ms: float
    decode_ms: float
    decode_steps: int
    cache_bytes_allocated: int
    cache_bytes_used: int
    queued_ms: float = 0.0
    reused_tokens: int = 0
    encoded_image_tokens: int = 0

    @property
    def decode_tokens_per_second(self) -> float:
        """Steps per second of this row's stream; 0 if the answer was a single token."""
        return 1e3 * self.decode_steps / self.decode_ms if self.decode_ms else 0.0


class SeenImage(NamedTuple):
    """What the language model was given of an image: ``rows`` int64 [K], rising, are the numbers of
    its tokens that went on from the encoder, all where none is dropped there. ``box`` and ``grid``
    tell where its tokens lie in the image (PreparedImage)."""

    rows: np.ndarray
    box: Box
    grid: np.ndarray | None


@dataclass(frozen=True)
class Generation:
    """One answer. ``token_ids`` ends with the token that ended the text where one did;
    ``finish_reason`` is "stop" (end of text, a stop string, one of stop_token_ids, or a structure
    that is complete) or "length".
    ``stop_reason`` tells which stop: the stop string, or the id of the token that ended the text;
    it is None for a structure, and at "length", where
    ``capacity_reached`` tells whether the bundle's capacity ended it before max_new_tokens.
    ``image_id`` tells of every prompt token whether it is text (0) or of the m-th image (m).
    ``merge_maps`` holds, per reduction, old -> new index of every token that enters it (a prompt
    token enters the first), -1 where it was dropped; padding follows in a batch. What was read for
    another prompt, or an earlier turn, has the maps of then, and what was read behind it stays.
    ``images`` tells which tokens of each image the prompt's are. ``scores`` has an
    entry per token where
    logprobs were asked for. ``others`` are the further answers where ``n`` were asked for."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats
    image_id: np.ndarray = field(repr=False, compare=False)
    merge_maps: list[np.ndarray] = field(repr=False, compare=False, default_factory=list)
    capacity_reached: bool = False
    scores: list[TokenScore] = field(repr=False, default_factory=list)
    stop_reason: str | int | None = None
    others: tuple[Generation, ...] = field(repr=False, default=())
    images: list[SeenImage] = field(repr=False, compare=False, default_factory=list)


def with_others(answers: Sequence[Generation]) -> Generation:
    """The first of several answers, which knows the rest."""
    first, *others = answers
    return replace(first, others=tuple(others)) if others else first


class Stream:
    """An iterator over the pieces of an answer; ``result`` is there after the last.

    To stop before that, ``close`` it, or use ``with``: a model is busy until then.
    """

    def __init__(
        self,
        pieces: Generator[str | Generation],
        times: Callable[[], list[float]],
        cancel: Callable[[], object] | None = None,
    ) -> None:
        """``times`` are those of the tokens so far; ``cancel`` is called when the stream is
        closed."""
        self._pieces, self._times, self._cancel = pieces, times, cancel
        self._count = 0
        self.result: Generation | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        for piece in self._pieces:
            if isinstance(piece, Generation):
                self.result = piece
            elif piece:
                self._count += 1
                return piece
        raise StopIteration

    @property
    def token_times(self) -> list[float]:
        """time.perf_counter() when each token so far was chosen; its text may be final later."""
        return list(self._times())

    def close(self) -> None:
        self._pieces.close()
        if self._cancel is not None:
            self._cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "going on" if self.result is None else f"ended by {self.result.finish_reason}"
        return f"<lvlm.Stream: {state}, {self._count} pieces>"
