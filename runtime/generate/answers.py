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
    """Statistics of one answer. Times are of the whole batch; an engine's are of the steps that the
    request took part in.

    Args:
        prompt_tokens: tokens of the prompt that entered the language model.
        image_tokens: those of images and videos among them.
        new_tokens: tokens of the answer.
        tokens_per_layer: of each layer, tokens that entered it in prefill.
        image_tokens_per_layer: those of images and videos among them.
        kept_per_layer: of each layer, entries that prefill left in its cache.
        vision_ms: milliseconds of encoding images.
        prefill_ms: milliseconds of reading the prompt.
        decode_ms: milliseconds of the decode steps.
        decode_steps: steps that the answer took part in.
        cache_bytes_allocated: bytes of the batch's cache; of an engine's, a slot's.
        cache_bytes_used: bytes of the entries at the end.
        queued_ms: milliseconds that a request waited in an engine's queue.
        reused_tokens: tokens of the prompt that lay in an engine's cache already.
        encoded_image_tokens: tokens that the encoder gave, before any were dropped.
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
    """Tokens of an image that the language model was given.

    Args:
        rows: int64 [K], rising: the numbers of its tokens that went on from the encoder.
        box: left, top, right and bottom of what its tokens show, in widths and heights of the
            image: less than 0, 0, 1, 1 where it was cropped, more where it was padded.
        grid: int [R,C]: of a grid over the box, the token at each place, -1: none. None: that of
            the manifest, or none is known.
    """

    rows: np.ndarray
    box: Box
    grid: np.ndarray | None


@dataclass(frozen=True)
class Generation:
    """Answer to a prompt.

    Args:
        text: the answer, without a stop string.
        token_ids: its tokens; the last is the one that ended the text, where one did.
        finish_reason: "stop" (end of text, a stop string, one of stop_token_ids, or a structure
            that is complete) or "length".
        stats: what it took.
        image_id: int64 [N] of the N tokens of the prompt: 0 for text, m for the m-th image.
        merge_maps: per reduction int64 [tokens that enter it], old -> new index, -1 where a token
            was dropped; tokens of the prompt enter the first. Padding follows in a batch. What was
            read for another prompt, or an earlier turn, has the maps of then, and what was read
            behind it stays.
        capacity_reached: the bundle's capacity ended it before max_new_tokens.
        scores: one for each token where logprobs were asked for, else none.
        stop_reason: the stop string, or the id of the token that ended the text; None for a
            structure, and at "length".
        others: the further answers where ``n`` were asked for.
        images: of each image of the prompt, which of its tokens there are.
    """

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
    """Iterator over the pieces of an answer's text; its ``result``, a Generation, is there after
    the last.

    To stop before that, ``close`` it, or use ``with``: a model is busy until then.

    Args:
        pieces: the pieces, then the answer.
        times: gives those of the tokens so far, in seconds of time.perf_counter().
        cancel: called when the stream is closed.
    """

    def __init__(
        self,
        pieces: Generator[str | Generation],
        times: Callable[[], list[float]],
        cancel: Callable[[], object] | None = None,
    ) -> None:
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
        """Times at which the tokens so far were chosen, in seconds of time.perf_counter(); a
        token's text may be final later."""
        return list(self._times())

    def close(self) -> None:
        """End the answer here; nothing happens where it has ended."""
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
