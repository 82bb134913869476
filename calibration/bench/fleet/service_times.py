"""Seconds of an engine's work, between and beyond the sizes that were measured."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from lvlm.bench.costs import Costs, EngineShape, ReadCost
from lvlm.core.errors import ParameterError
from lvlm.runtime.generate.loaded_graphs import TOKENS_AT_ONCE

Points = Sequence[tuple[float, float]]  # rising


class ServiceTimes:
    """Seconds that an engine takes, from ``costs`` that were measured on it."""

    def __init__(self, engine: EngineShape, costs: Costs) -> None:
        self._costs = costs
        self._chunk = _chunk_law(costs.reads) if engine.chunked else None
        self._whole = {
            images: sorted(
                (float(r.tokens), r.seconds)
                for r in costs.reads
                if r.images == images and not r.behind
            )
            for images in {r.images for r in costs.reads}
        }
        self._rows = sorted({step.rows for step in costs.steps})
        self._by_rows = {
            rows: sorted((float(s.tokens), s.seconds) for s in costs.steps if s.rows == rows)
            for rows in self._rows
        }

    @property
    def prepare(self) -> float:
        """Before the engine has a request."""
        return self._costs.prepare

    def image(self, count: int) -> float:
        """Seconds of the vision graph. Raises ParameterError where that was not measured."""
        if count and self._costs.image is None:
            raise ParameterError(
                "these costs were measured without images; measure them with --images 1"
            )
        return count * (self._costs.image or 0.0)

    def chunk(self, tokens: int, behind: int) -> float:
        """Seconds of a chunk of a prompt."""
        assert self._chunk is not None
        return max(float(_features([(tokens, behind)]) @ self._chunk), 1e-6)

    def whole(self, tokens: int, images: int) -> float:
        """Seconds of a prompt read at once. Raises ParameterError for other images than there
        were."""
        points = self._whole.get(images)
        if not points:
            raise ParameterError(
                f"these costs were measured with {' or '.join(map(str, sorted(self._whole)))} "
                f"images in a prompt, not {images}; measure them with --images {images}"
            )
        if len(points) == 1:
            return points[0][1] * max(1.0, tokens / points[0][0])
        return _along(points, tokens)

    def step(self, rows: int, tokens: float) -> float:
        """Seconds of a decode step of ``rows`` with ``tokens`` in the cache each."""
        place = bisect_left(self._rows, rows)
        if place == len(self._rows):  # no engine has more rows than were measured
            raise ParameterError(
                f"steps were measured up to {self._rows[-1]} rows, not {rows}; measure them with "
                f"--slots {rows}"
            )
        high = _along(self._by_rows[self._rows[place]], tokens)
        if self._rows[place] == rows:
            return high
        below = self._rows[place - 1]
        low = _along(self._by_rows[below], tokens)
        return low + (high - low) * (rows - below) / (self._rows[place] - below)


def _along(points: Points, at: float) -> float:
    """Linear between points, beyond the last as between the last two; below the first, and of a
    single one, as that is."""
    if at <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if at <= right:
            return low + (high - low) * (at - left) / (right - left)
    if len(points) == 1:
        return points[0][1]
    (left, low), (right, high) = points[-2:]
    slope = max(0.0, (high - low) / (right - left))
    return high + slope * (at - right)


def _chunk_law(reads: Iterable[ReadCost]) -> np.ndarray:
    """Seconds of a chunk: some by itself, some for each token, and for each pair of a token and one
    that it sees. The least squares of relative errors; what would be below 0 is left out."""
    rows, seconds = [], []
    for read in reads:
        starts = range(read.behind, read.behind + read.tokens, TOKENS_AT_ONCE)
        end = read.behind + read.tokens
        rows.append(_features([(min(TOKENS_AT_ONCE, end - start), start) for start in starts]))
        seconds.append(read.seconds)
    matrix = np.array(rows) / np.array(seconds)[:, None]
    used = [1, 0, 2][: len(seconds)]  # one time alone is that of its tokens
    while True:
        found = np.zeros(3)
        found[used] = np.linalg.lstsq(matrix[:, used], np.ones(len(seconds)), rcond=None)[0]
        if (found >= 0).all():
            return found
        used.remove(int(found.argmin()))


def _features(chunks: Iterable[tuple[int, int]]) -> np.ndarray:
    """[3]: chunks, tokens, pairs."""
    found = np.zeros(3)
    for tokens, behind in chunks:
        found += (1, tokens, tokens * (behind + tokens / 2))
    return found
