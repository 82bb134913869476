"""A request on its way: what is asked, how far it has come, and whom it is told."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lvlm.runtime.engine.session import Read, Session
from lvlm.runtime.generate.answers import Generation, SeenImage, Stats
from lvlm.runtime.generate.call_plan import PromptCounts
from lvlm.runtime.generate.row import Row
from lvlm.runtime.options.generation_options import Keep
from lvlm.runtime.prompt.prompts import Prompt
from lvlm.runtime.prompt.text import TextStream
from lvlm.runtime.sampling.sampler import TokenScore

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11


class Caller(Protocol):
    """The caller of a request, which the loop tells of its progress."""

    @property
    def done(self) -> bool:
        """True once nobody waits any more: answered, failed, or ended by its caller."""

    @property
    def text(self) -> str:
        """All pieces so far."""

    def push(self, token: int, piece: str, score: TokenScore | None) -> None:
        """The next token of the answer, the text that is final with it, and the token's score
        where one was asked for."""

    def finish(self, result: Generation) -> object:
        """The whole answer."""

    def fail(self, error: Exception) -> object:
        """End without an answer."""


@dataclass(eq=False)
class Request:
    """Belongs to the thread of its batch once it is admitted.

    ``counts`` are those of the prompts that are read together, of which this is the ``index``-th.
    ``stream`` makes text of the tokens; None: nobody asked for any. ``digests`` name the images,
    ``keys`` [N] int64 the prompt's tokens by content, images included (prefixes.py); neither is
    asked for where nothing is kept for others. ``feed`` are prompt tokens that decode still has to
    read. ``spoiled``: its entries may not be finite. ``submitted`` and ``deadline`` are on
    perf_counter's clock. ``forks`` are further answers to the same prompt: it is read once, into
    this one's row, which is copied into theirs. ``session`` keeps the row's entries afterwards;
    ``read`` is how they came to be, ``asked_ratios`` the keep and kv_keep that were asked for.
    """

    prompt: Prompt
    counts: PromptCounts
    caller: Caller
    stream: TextStream | None = None
    index: int = 0
    digests: list[bytes] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    submitted: float = field(default_factory=time.perf_counter)
    deadline: float | None = None
    forks: list[Request] = field(default_factory=list)
    session: Session | None = None
    asked_ratios: tuple[Keep | None, float | None] = (None, None)
    read: Read | None = None
    feed: deque[int] = field(default_factory=deque)
    spoiled: bool = False
    reused: int = 0
    queued_ms: float = 0.0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    decode_steps: int = 0

    def __post_init__(self) -> None:
        self.row = Row(self.prompt, self.counts.limits[self.index])
        if self.read is None:
            entries = self.counts.prefill.entries[:, self.index : self.index + 1]
            shown = np.flatnonzero(self.prompt.image_id > 0)
            images = int(shown[-1]) + 1 if len(shown) else 0
            self.read = Read(entries, *self.asked_ratios, images)

    @property
    def group(self) -> list[Request]:
        """Itself and its forks."""
        return [self, *self.forks]

    def fork(self, number: int, caller: Caller, stream: TextStream | None) -> Self:
        """A further answer to the same prompt, drawn for itself; before any of them is begun."""
        prompt = replace(self.prompt, sampling=self.prompt.sampling.fork(number))
        made = replace(self, prompt=prompt, caller=caller, stream=stream, forks=[], feed=deque())
        self.forks.append(made)
        return made

    def note(
        self, before: int, rows: Sequence[np.ndarray], maps: Sequence[np.ndarray] | None = None
    ) -> None:
        """Note the outcome of the images behind the first ``before``, and of all tokens that are
        read as a whole."""
        assert self.read is not None
        told = self.read.maps if maps is None else tuple(maps)
        self.read = replace(self.read, rows=(*self.read.rows[:before], *rows), maps=told)

    def read_as(self, other: Request) -> None:
        """Note how the prompt was read, by the one whose fork this is."""
        self.vision_ms, self.prefill_ms = other.vision_ms, other.prefill_ms
        self.read, self.reused = other.read, other.reused

    def leave_queue(self) -> None:
        """Note that its prompt is about to be read."""
        for request in self.group:
            request.queued_ms = (time.perf_counter() - self.submitted) * 1e3

    @property
    def ended(self) -> bool:
        """True once there is nothing more to choose."""
        return self.row.finish_reason is not None or self.caller.done

    @property
    def next_token(self) -> int:
        """The token to feed decode."""
        return self.feed[0] if self.feed else self.row.tokens[-1]

    def goes_on(self, read: Read, fed: int, capacities: np.ndarray) -> bool:
        """True where entries that were ``read`` so, with all that decode has been and will be
        ``fed`` until the answer is as long as it may be, are what was asked for, and have room."""
        if (read.keep, read.kv_keep) != self.asked_ratios:
            return False
        needed = self.counts.budgets.capacity(read.entries, np.array([fed]))
        return bool((needed <= capacities).all())

    def held_keys(self) -> np.ndarray:
        """Keys of the first entries of its row: the prompt's tokens, then the answer's."""
        return np.concatenate([self.keys, np.array(self.row.tokens, np.int64)])

    def choose(self, logits: np.ndarray, eos_ids: tuple[int, ...]) -> None:
        """The next token of the answer, from logits [vocabulary] or the likeliest token [] int64,
        handed to the caller."""
        row, stream = self.row, self.stream
        token, piece = row.choose(logits, eos_ids), ""
        if stream is not None:
            if token in self.prompt.sampling.stop_token_ids:  # no part of the text
                piece = stream.finish()
            else:
                piece = stream.push(token, last=row.finish_reason is not None)
            if stream.stopped is not None:
                row.stop(stream.stopped)
        score = None if self.prompt.logprobs is None else row.scores[-1]
        self.caller.push(token, piece, score)

    def generation(self, allocated: int, used: int) -> Generation:
        """The answer, once it has a finish_reason; bytes of its cache."""
        row, prompt = self.row, self.prompt
        assert row.finish_reason is not None
        assert self.read is not None
        stats = Stats(
            **self.counts.of_row(self.index),
            encoded_image_tokens=sum(image.tokens for image in prompt.images),
            new_tokens=len(row.tokens),
            vision_ms=self.vision_ms,
            prefill_ms=self.prefill_ms,
            decode_ms=self.decode_ms,
            decode_steps=self.decode_steps,
            cache_bytes_allocated=allocated,
            cache_bytes_used=used,
            queued_ms=self.queued_ms,
            reused_tokens=self.reused,
        )
        return Generation(
            self.caller.text,
            row.tokens,
            row.finish_reason,
            stats,
            prompt.image_id,
            list(self.read.of(len(prompt.ids)).maps),
            row.cut_short,
            row.scores,
            row.stop_reason,
            # There may be rows of more images: the prompt that was read went on after this one's
            images=[
                SeenImage(rows, image.box, image.grid)
                for rows, image in zip(self.read.rows, prompt.images, strict=False)
            ],
        )
