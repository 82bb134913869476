"""Statistics of an engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW = 10  # seconds that the speed is told of


@dataclass(frozen=True)
class EngineStats:
    """An engine at one moment; counts are since it was opened. A request for n answers counts as n.

    Args:
        running: requests that are being answered, their prompts read or their tokens chosen.
        waiting: requests in the queue.
        submitted: requests that were taken.
        answered: those of them that got their answer; what is neither running nor waiting nor
            answered was cancelled, ran out of time or failed.
        new_tokens: tokens of all answers.
        tokens_per_second: new tokens of all answers together, over the last 10 seconds.
        prompt_tokens: tokens of the prompts that were begun.
        reused_tokens: those of them that lay in the cache already.
        image_hits: images whose features were known.
        image_misses: images that were encoded.
        cache_bytes: bytes of the whole cache.
        cache_bytes_used: bytes of the entries of running requests.
    """

    running: int
    waiting: int
    submitted: int
    answered: int
    new_tokens: int
    tokens_per_second: float
    prompt_tokens: int
    reused_tokens: int
    image_hits: int
    image_misses: int
    cache_bytes: int
    cache_bytes_used: int


class Meter:
    """Counters of an engine. The loop's thread writes, any thread reads."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._opened = clock()
        self._seconds: deque[list[int]] = deque(maxlen=WINDOW)  # [second, tokens]
        self.submitted = self.answered = 0
        self.new_tokens = self.prompt_tokens = self.reused_tokens = 0

    def token(self) -> None:
        """One more was chosen."""
        second = int(self._clock() - self._opened)
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append([second, 0])
        self._seconds[-1][1] += 1
        self.new_tokens += 1

    def tokens_per_second(self) -> float:
        """Rate over the last WINDOW seconds, or since the engine was opened."""
        now = self._clock() - self._opened
        first = max(0, int(now) + 1 - WINDOW)
        tokens = sum(count for second, count in list(self._seconds) if second >= first)
        return tokens / max(now - first, 1e-3)
