"""A request inside the engine: what is asked, and how far it has come."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from lvlm.runtime.engine.handle import Handle
from lvlm.runtime.generate.answers import Generation, Stats
from lvlm.runtime.generate.call_plan import PromptCounts
from lvlm.runtime.generate.row import Row
from lvlm.runtime.prompt.prompts import Prompt
from lvlm.runtime.prompt.text import TextStream


@dataclass(eq=False)
class Request:
    """Belongs to the engine's thread once it is submitted.

    ``keys`` [N] int64 name the prompt's tokens by content, pictures included (prefixes.py).
    ``feed`` are prompt tokens that decode still has to read. ``deadline`` is on perf_counter's
    clock. ``digests`` name the pictures.
    """

    prompt: Prompt
    counts: PromptCounts
    stream: TextStream
    handle: Handle
    digests: list[bytes]
    keys: np.ndarray
    deadline: float | None
    feed: deque[int] = field(default_factory=deque)
    reused: int = 0
    maps: list[np.ndarray] = field(default_factory=list)
    queued_ms: float = 0.0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    decode_steps: int = 0

    def __post_init__(self) -> None:
        self.row = Row(self.prompt, self.counts.limits[0])

    def begin(self) -> None:
        """It leaves the queue."""
        self.queued_ms = (time.perf_counter() - self.handle.submitted) * 1e3

    @property
    def next_token(self) -> int:
        """What decode is to be fed."""
        return self.feed[0] if self.feed else self.row.tokens[-1]

    def held_keys(self) -> np.ndarray:
        """What the first entries of its row are: the prompt's tokens, then the answer's."""
        return np.concatenate([self.keys, np.array(self.row.tokens, np.int64)])

    def choose(self, logits: np.ndarray, eos_ids: tuple[int, ...]) -> None:
        """The next token of the answer, from logits [vocabulary], handed to the caller."""
        row = self.row
        token = row.choose(logits, eos_ids)
        piece = self.stream.push(token, last=row.finish_reason is not None)
        if self.stream.stopped is not None:
            row.stop(self.stream.stopped)
        self.handle.push(token, piece)

    def generation(self, slot_bytes: int, used_bytes: int) -> Generation:
        """The answer, once it has a finish_reason."""
        row = self.row
        assert row.finish_reason is not None
        stats = Stats(
            **self.counts.of_row(0),
            new_tokens=len(row.tokens),
            vision_ms=self.vision_ms,
            prefill_ms=self.prefill_ms,
            decode_ms=self.decode_ms,
            decode_steps=self.decode_steps,
            cache_bytes_allocated=slot_bytes,
            cache_bytes_used=used_bytes,
            queued_ms=self.queued_ms,
            reused_tokens=self.reused,
        )
        return Generation(
            self.handle.text,
            row.tokens,
            row.finish_reason,
            stats,
            self.prompt.image_id,
            [m[0] for m in self.maps],
            row.cut_short,
            row.scores,
            row.stop_reason,
        )
