"""How many cache entries stay: every count of one call, from the manifest alone.

The graphs rank entries and move them; how many stay is decided here, so that the host knows every
length without asking the device. Uniform budgets follow Elastic Cache (arXiv 2407.18121), budgets
per layer PrefixKV (arXiv 2412.03409).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from numbers import Real

import numpy as np

from lvlm.core.errors import ParameterError
from lvlm.core.rounding import DIGITS, rounded
from lvlm.runtime.bundle.manifest import Compression, ProfileRow

TOLERANCE = 10.0**-DIGITS


@dataclass(frozen=True)
class Budgets:
    """How many entries each layer keeps.

    ``fractions`` float64 [L,1], each layer's share, or [L,B] where rows have their own; ``keep``,
    the call's share of all entries. In what follows L are the layers, B the rows; counts are int64.
    """

    compression: Compression | None
    fractions: np.ndarray
    keep: float

    @classmethod
    def of(cls, compression: Compression | None, layers: int, kv_keep: float | None) -> Budgets:
        """Budgets of a call; ``kv_keep`` None: as exported. ParameterError: not in (0, 1], or
        below 1 for a bundle without compression."""
        keep = None if kv_keep is None else _fraction(kv_keep)
        if compression is None:
            if keep not in (None, 1.0):
                raise ParameterError(
                    f"kv_keep={keep} needs a bundle with cache compression; export with --recipe "
                    "elastic-cache, prefixkv, uniform or lightvlm"
                )
            return cls(None, np.ones((layers, 1)), 1.0)
        keep = compression.keep if keep is None else keep
        fractions = _fractions(compression.profile, layers, keep)
        return cls(compression, fractions[:, None], keep)

    def prompt(self, entries: np.ndarray) -> np.ndarray:
        """What prefill leaves [L,B] of the ``entries`` [L,B] that entered each layer."""
        c = self.compression
        if c is None:
            return entries.astype(np.int64)
        if c.interval is not None:
            return self.step(entries)
        upper = entries if c.cap is None else np.minimum(entries, c.cap)
        if c.semantics == "reference":
            return _int64(np.minimum(self._released(entries), upper))
        lower = np.minimum(self.protected, entries)
        share = self.fractions * entries
        if not c.profile:
            return _int64(np.clip(rounded(share), lower, upper))
        rows = [_apportion(*row) for row in zip(share.T, lower.T, upper.T, strict=True)]
        return np.stack(rows, axis=1)

    def step(self, seen: np.ndarray) -> np.ndarray:
        """Entries [L,B] that may stay in decode when a layer has cached ``seen`` [L,B] so far.

        One token more raises it by at most one. At the fixed point only the sinks are protected.
        """
        c = self.compression
        if c is None:
            return seen.astype(np.int64)
        share = np.ceil(self.fractions * seen - TOLERANCE)
        if c.semantics == "reference":  # float noise included
            share = np.ceil(seen * (1 - (1 - self.fractions)))
        least = max(1, c.sinks) if c.interval is None else self.protected
        most = seen if c.cap is None else np.minimum(seen, c.cap)
        return _int64(np.clip(np.maximum(share, c.floor), np.minimum(least, seen), most))

    def fixed_point(self, kept: np.ndarray) -> np.ndarray:
        """Index [L,B] by age of the entry that elimination one by one removes; ``kept`` [L,B] of
        the prompt. It equals ``kept`` where only sinks are left: then answers lose their oldest.
        The released code guards no sink."""
        assert self.compression is not None
        assert self.compression.distance is not None
        distance = self.compression.distance
        point = np.where(kept <= distance, kept // 2, kept - distance)
        if self.compression.semantics == "reference":
            return _int64(point)
        return _int64(np.minimum(np.maximum(point, self.compression.sinks), kept))

    def capacity(self, entries: np.ndarray, new_tokens: np.ndarray) -> np.ndarray:
        """Slots per layer [L] that rows of ``entries`` [L,B] ever occupy, the largest row's.

        ``new_tokens`` [B] counts the tokens fed to decode (the last one chosen is not).
        """
        c, kept = self.compression, self.prompt(entries)
        if c is None:
            slots = kept + new_tokens
        elif c.interval is None:
            # The last token found its layer at its length a step before, plus one for the victim.
            grown = np.minimum(kept + new_tokens, self.step(entries + new_tokens - 1) + 1)
            slots = np.where(new_tokens > 0, np.maximum(kept + 1, grown), kept)
        else:
            # Every run of compact.onnx ends at the budget, where prefill ended too.
            runs, rest = new_tokens // c.interval, new_tokens % c.interval
            before = self.step(entries + np.maximum(runs - 1, 0) * c.interval) + c.interval
            after = self.step(entries + runs * c.interval) + rest
            slots = np.where(runs > 0, np.maximum(before, after), after)
        return _int64(slots.max(axis=1))

    def limit(self, seen: np.ndarray) -> np.ndarray:
        """Slots per layer [L] that ``seen`` [L] entries ever occupy, however many of them are the
        prompt's: what an export lays out."""
        c = self.compression
        if c is None:
            return seen.astype(np.int64)
        most = self.step(seen[:, None])[:, 0]
        if c.interval is not None:
            return np.asarray(np.minimum(seen, most + c.interval))
        prompt = self.prompt(seen[:, None])[:, 0]
        least = np.maximum(np.maximum(most, prompt), self.protected)
        return np.asarray(np.minimum(seen, least + 1))

    def room(self, entries: np.ndarray, capacities: np.ndarray, most: int) -> int:
        """Tokens up to ``most`` that one row of ``entries`` [L] may be fed within ``capacities``
        [L]; 0 if none."""

        def full(tokens: int) -> bool:
            needed = self.capacity(np.asarray(entries)[:, None], np.array([tokens]))
            return bool((needed > capacities).any())

        return bisect_left(range(1, most + 1), True, key=full)

    @property
    def protected(self) -> int:
        """Entries that every compaction leaves: the first ones and the last ones."""
        return 0 if self.compression is None else self.compression.sinks + self.compression.recent

    def _released(self, entries: np.ndarray) -> np.ndarray:
        """Counts [L,B] as the papers' released code has them, float noise included."""
        assert self.compression is not None
        least = np.minimum(self.compression.sinks + 1, entries)
        if self.compression.profile:
            forgotten = np.rint((1 - self.fractions) * entries)
            return _int64(np.maximum(entries - forgotten, least))
        ratio = 1 - self.keep
        forgotten = (entries - entries * (1 - ratio)).astype(np.int64)
        several = np.maximum(entries - 1 - forgotten, least)
        one = np.where(forgotten == 1, entries - 1, several)
        return _int64(np.where(forgotten <= 0, entries, one))


def _fraction(value: object) -> float:
    # NaN fails every comparison
    usable = isinstance(value, Real) and not isinstance(value, bool)
    if not usable or not 0 < (number := float(value)) <= 1:  # type: ignore[arg-type]
        raise ParameterError(f"kv_keep is {value!r}; give a number above 0 and up to 1")
    return number


def _fractions(profile: tuple[ProfileRow, ...], layers: int, keep: float) -> np.ndarray:
    """The share of each layer [L]: between the profile's rows, nothing and everything at its ends,
    so that the mean stays ``keep``."""
    if not profile:
        return np.full(layers, keep)
    rows = [row for row in profile if row.keep < 1]
    keeps = [0.0, *(row.keep for row in rows), 1.0]
    table = np.array([np.zeros(layers), *(row.fractions for row in rows), np.ones(layers)])
    return np.array([np.interp(keep, keeps, column) for column in table.T])


def _apportion(share: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Whole numbers [L] whose sum is that of ``share`` [L], rounded, as near to it as they can be.

    Largest remainder: everyone gets its floor, the rest goes by descending fractional part, lower
    layers first. Where the bounds take or give, all others move by as much; nothing within the
    bounds [L] has a smaller sum of squared differences. Bounds that exclude the sum move the sum.
    """
    total = rounded(math.fsum(share))
    total = min(max(total, int(lower.sum())), int(upper.sum()))
    exact = np.round(share, DIGITS)
    floors = np.floor(exact)

    def moved(by: int) -> np.ndarray:
        return _int64(np.clip(floors + by, lower, upper))

    far = int(max(floors.max(), upper.max())) + 1  # down to all lower bounds, up to all upper ones
    by = bisect_right(range(-far, far), total, key=lambda by: int(moved(by).sum())) - 1 - far
    counts = moved(by)
    order = np.argsort(-np.round(exact - floors, DIGITS), kind="stable")
    ready = order[moved(by + 1)[order] > counts[order]]
    counts[ready[: total - int(counts.sum())]] += 1
    return counts


def _int64(counts: np.ndarray) -> np.ndarray:
    return np.asarray(counts, np.int64)
