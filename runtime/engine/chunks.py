"""Length of the pieces in which a long prompt is read between decode steps, by measured time."""

from __future__ import annotations

import math

from lvlm.runtime.generate.loaded_graphs import TOKENS_AT_ONCE

CHUNK_STEPS = 20  # decode steps that take about as long as a chunk, of whatever runs beside it
# The same while more prompts wait to be read, where gaps come for long: short ones for many
# streams, longer ones for few, whose steps take nearly as long as those of many
QUEUE_STEPS = 3
HELD_STEPS = 48  # times the streams that are held up
STEPS_BETWEEN = 3  # decode steps from one such chunk to the next, at most
FIRST = 64  # tokens, before anything was measured
MIN_TOKENS = 16  # fewer cost as much
NEWEST = 0.3  # weight of the newest time in the mean


class ChunkPace:
    """Tokens of the next chunk. For one thread.

    Args:
        tokens: of every chunk; None: as many as are read in the time of CHUNK_STEPS steps.
    """

    def __init__(self, tokens: int | None) -> None:
        self._fixed = tokens
        self._step: float | None = None  # seconds, of one decode step
        self._token: float | None = None  # of a token in a chunk

    @property
    def free(self) -> bool:
        """True where measured time says how long to read."""
        return self._fixed is None

    @property
    def measured(self) -> bool:
        """True once it can: there was a step."""
        return self.free and self._step is not None

    def slice_seconds(self, streams: int, *, queue: bool) -> float:
        """Time in which more of a prompt is read, once there was a step, while so many ``streams``
        are held up; ``queue``: others wait to be read after it."""
        assert self._step is not None
        steps = max(QUEUE_STEPS, HELD_STEPS / streams) if queue else CHUNK_STEPS
        return self._step * min(steps, CHUNK_STEPS)

    def stepped(self, seconds: float) -> None:
        """A decode step took so long."""
        self._step = _mean(self._step, seconds)

    def read(self, tokens: int, seconds: float) -> None:
        """A chunk of so many tokens took so long."""
        if tokens >= MIN_TOKENS:
            self._token = _mean(self._token, seconds / tokens)

    def steps_after(self, seconds: float, *, queue: bool = False) -> int:
        """Decode steps that come after what was read in so many seconds, before more is read: from
        one on as many as keep their share beside chunks of measured length, so that what waits is
        not held up for what was read quickly, as a small image is. ``queue``: a slice, with others
        that wait to be read after it."""
        if queue:
            return 1
        if self._fixed or self._step is None:
            return STEPS_BETWEEN
        owed = STEPS_BETWEEN * seconds / (CHUNK_STEPS * self._step)
        return min(max(1, math.ceil(owed)), STEPS_BETWEEN)

    def tokens(self, *, beside: bool) -> int:
        """Tokens of the next chunk; ``beside``: while others wait for their next tokens."""
        if self._fixed is not None:
            return self._fixed
        if not beside:
            return TOKENS_AT_ONCE
        if self._step is None or not self._token:
            return FIRST
        wanted = int(CHUNK_STEPS * self._step / self._token)
        return min(max(MIN_TOKENS, wanted), TOKENS_AT_ONCE)


def _mean(before: float | None, newest: float) -> float:
    return newest if before is None else before + NEWEST * (newest - before)
