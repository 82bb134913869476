"""Figures from token times: percentiles, rates, the spread between rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RequestRecord:
    """One request of a round; times in seconds from the round's start.

    ``arrival`` is when it was wanted, not when a busy client got round to sending it; ``tokens``
    when each new token was there. Bytes are of its cache at the end; None: the contender does not
    tell. ``prompt_tokens`` counts images' tokens, too.
    """

    arrival: float
    tokens: tuple[float, ...]
    prompt_tokens: int
    cache_bytes: int | None = None


@dataclass(frozen=True)
class Round:
    """All requests of one case by one contender, once. ``peak_bytes``: most resident memory."""

    records: tuple[RequestRecord, ...]
    peak_bytes: int | None

    @property
    def ttft(self) -> list[float]:
        """Seconds from arrival to the first token."""
        return [r.tokens[0] - r.arrival for r in self.records]

    @property
    def gaps(self) -> list[float]:
        """Seconds between one token and the next, of all requests."""
        return [b - a for r in self.records for a, b in zip(r.tokens, r.tokens[1:], strict=False)]

    @property
    def seconds(self) -> float:
        """Seconds from the first arrival to the last token."""
        return max(r.tokens[-1] for r in self.records) - min(r.arrival for r in self.records)

    @property
    def tokens_per_s(self) -> float:
        return sum(len(r.tokens) for r in self.records) / self.seconds

    @property
    def requests_per_s(self) -> float:
        return len(self.records) / self.seconds

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Rate of a stream after its first token: median over requests; None for one-token
        answers."""
        speeds = [
            (len(r.tokens) - 1) / (r.tokens[-1] - r.tokens[0])
            for r in self.records
            if len(r.tokens) > 1
        ]
        return statistics.median(speeds) if speeds else None


@dataclass(frozen=True)
class RoundSpread:
    """A figure over the rounds: its median, lowest and highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> RoundSpread:
        return cls(statistics.median(values), min(values), max(values))

    @property
    def noise(self) -> float:
        """Half the range as a fraction of the median: the ± of a table."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


@dataclass(frozen=True)
class CaseFigures:
    """A contender on a case, over its rounds. Milliseconds; percentiles pool all rounds."""

    ttft_ms: RoundSpread
    ttft_p95_ms: float
    itl_p50_ms: float | None
    itl_p95_ms: float | None
    itl_p99_ms: float | None
    decode_tokens_per_s: RoundSpread | None
    tokens_per_s: RoundSpread
    requests_per_s: RoundSpread
    peak_bytes: int | None
    cache_bytes: int | None
    prompt_tokens: int

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> CaseFigures:
        gaps = [1e3 * g for r in rounds for g in r.gaps]
        decode = [r.decode_tokens_per_s for r in rounds]
        records = [record for r in rounds for record in r.records]
        return cls(
            ttft_ms=RoundSpread.of([1e3 * statistics.median(r.ttft) for r in rounds]),
            ttft_p95_ms=percentile([1e3 * t for r in rounds for t in r.ttft], 95),
            itl_p50_ms=percentile(gaps, 50) if gaps else None,
            itl_p95_ms=percentile(gaps, 95) if gaps else None,
            itl_p99_ms=percentile(gaps, 99) if gaps else None,
            decode_tokens_per_s=RoundSpread.of([d for d in decode if d is not None])
            if gaps
            else None,
            tokens_per_s=RoundSpread.of([r.tokens_per_s for r in rounds]),
            requests_per_s=RoundSpread.of([r.requests_per_s for r in rounds]),
            peak_bytes=_max(r.peak_bytes for r in rounds),
            cache_bytes=_max(r.cache_bytes for r in records),
            prompt_tokens=max(r.prompt_tokens for r in records),
        )

    def plain(self) -> dict[str, Any]:
        """The figures for JSON, the ± of every spread beside it."""
        data = asdict(self)
        for name in data:
            value = getattr(self, name)
            if isinstance(value, RoundSpread):
                data[name]["noise"] = value.noise
        return data


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that ``percent`` of ``values`` do not exceed, linear between neighbours (as NumPy).

    ``values`` may be in any order, one at least.
    """
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _max(values: Iterable[int | None]) -> int | None:
    return max((v for v in values if v is not None), default=None)
