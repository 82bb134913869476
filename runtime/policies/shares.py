"""Budgets: how many cache entries a layer keeps (policy.py).

Uniform budgets follow Elastic Cache (arXiv 2407.18121), budgets per layer PrefixKV (arXiv
2412.03409) or PyramidKV (arXiv 2406.02069). In what follows L are the layers, B the rows; counts
are int64.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from lvlm.core.errors import ParameterError
from lvlm.core.ranges import fraction, integer
from lvlm.core.rounding import DIGITS, rounded

TOLERANCE = 10.0**-DIGITS


@dataclass(frozen=True)
class ProfileRow:
    """The fraction each layer keeps when ``keep`` of all entries are kept; their mean is keep."""

    keep: float
    fractions: tuple[float, ...]


@dataclass(frozen=True)
class Share:
    """Base of all budgets: a fraction ``keep`` of the entries stays (a call may ask for
    less), and a layer never keeps more than ``cap``, if that is given.

    profiled  True where each layer's share comes from a profile of the model
    released  True where it counts as the released code of a paper; goes with such a decode only
    """

    keep: float
    cap: int | None = None
    profiled: ClassVar[bool] = False
    released: ClassVar[bool] = False

    def __post_init__(self) -> None:
        fraction("kv_keep", self.keep)
        if self.cap is not None:
            integer("kv_cap", self.cap, 1)

    def check_cap(self, protected: int) -> None:
        """ParameterError unless the cap leaves room for what is protected."""
        if self.cap is not None and self.cap < protected:
            raise ParameterError(
                f"kv_cap is {self.cap!r}, but {protected} entries are protected; give an "
                f"integer of {protected} or more"
            )

    def check_layers(self, layers: int) -> None:
        """ParameterError unless it is for a model of so many ``layers``."""

    def capped(self, entries: np.ndarray) -> np.ndarray:
        """``entries`` [L,B] within the cap."""
        return entries if self.cap is None else np.minimum(entries, self.cap)

    def fractions(self, layers: int, keep: float) -> np.ndarray:
        """Each layer's share [L] where ``keep`` of all entries stay."""
        return np.full(layers, keep)

    def prompt(
        self, fractions: np.ndarray, keep: float, entries: np.ndarray, protected: int
    ) -> np.ndarray:
        """Entries [L,B] that stay of a prompt's ``entries`` [L,B], at ``fractions`` [L,B or 1]."""
        del keep
        lower, upper = np.minimum(protected, entries), self.capped(entries)
        return _int64(np.clip(rounded(fractions * entries), lower, upper))

    def step(self, fractions: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Entries [L,B] that may stay of all ``seen`` [L,B] so far, before caps and what is
        protected. One token more raises it by at most one."""
        return np.asarray(np.ceil(fractions * seen - TOLERANCE))

    def whole(self) -> Uniform:
        """A budget by which everything stays."""
        return Uniform(1.0)


@dataclass(frozen=True)
class Uniform(Share):
    """Every layer keeps the same fraction."""

    kind: Literal["uniform"] = "uniform"


@dataclass(frozen=True)
class PerLayer(Share):
    """Each layer has a share of its own.

    Counts are exact: round(keep * N * L) over all layers; what a bound takes from one goes to the
    others.
    """

    def prompt(
        self, fractions: np.ndarray, keep: float, entries: np.ndarray, protected: int
    ) -> np.ndarray:
        del keep
        lower, upper = np.minimum(protected, entries), self.capped(entries)
        columns = zip((fractions * entries).T, lower.T, upper.T, strict=True)
        return np.stack([_apportion(*column) for column in columns], axis=1)


@dataclass(frozen=True)
class Slope(PerLayer):
    """Shares fall evenly from the first layer to the last, whose share is the mean's over ``beta``
    (PyramidKV, arXiv 2406.02069, section 3.2). Where the first would exceed everything they fall
    less, so that the mean is still ``keep``."""

    beta: float = 20.0
    kind: Literal["slope"] = "slope"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.beta, int | float) or not 1 <= self.beta < math.inf:
            raise ParameterError(f"beta is {self.beta!r}; give a number of 1 (no slope) or more")

    def fractions(self, layers: int, keep: float) -> np.ndarray:
        steepest = min(keep * (1 - 1 / self.beta), 1 - keep)
        return keep + steepest * np.linspace(1, -1, layers) if layers > 1 else np.array([keep])


@dataclass(frozen=True)
class Profiled(PerLayer):
    """Shares by a profile: ``rows`` by rising keep, interpolated between."""

    rows: tuple[ProfileRow, ...] = ()
    profiled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rows(self.rows)

    def check_layers(self, layers: int) -> None:
        if any(len(row.fractions) != layers for row in self.rows):
            raise ParameterError(f"the profile is for another number of layers than {layers}")

    def fractions(self, layers: int, keep: float) -> np.ndarray:
        return _interpolated(self.rows, layers, keep)


@dataclass(frozen=True)
class Profile(Profiled):
    """The profile's shares, as they are."""

    kind: Literal["profile"] = "profile"


@dataclass(frozen=True)
class Mixed(Profiled):
    """The part ``adaptive`` of the budget is laid out by the profile, the rest uniformly."""

    adaptive: float = 0.2
    kind: Literal["mixed"] = "mixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("adaptive", self.adaptive)

    def fractions(self, layers: int, keep: float) -> np.ndarray:
        return self.adaptive * super().fractions(layers, keep) + (1 - self.adaptive) * keep


@dataclass(frozen=True)
class ReleasedUniform(Share):
    """Uniform budget as Elastic Cache's released code counts, float noise included."""

    kind: Literal["released-uniform"] = "released-uniform"
    released: ClassVar[bool] = True

    def prompt(
        self, fractions: np.ndarray, keep: float, entries: np.ndarray, protected: int
    ) -> np.ndarray:
        del fractions
        lower, ratio = np.minimum(protected, entries), 1 - keep
        forgotten = _int64((entries - entries * (1 - ratio)).astype(np.int64))
        several = np.maximum(entries - 1 - forgotten, lower)
        one = np.where(forgotten == 1, entries - 1, several)
        return _int64(np.minimum(np.where(forgotten <= 0, entries, one), self.capped(entries)))

    def step(self, fractions: np.ndarray, seen: np.ndarray) -> np.ndarray:
        return _released_step(fractions, seen)


@dataclass(frozen=True)
class ReleasedProfile(Profiled):
    """Profile as PrefixKV's released code counts: every layer rounds on its own."""

    kind: Literal["released-profile"] = "released-profile"
    released: ClassVar[bool] = True

    def prompt(
        self, fractions: np.ndarray, keep: float, entries: np.ndarray, protected: int
    ) -> np.ndarray:
        del keep
        forgotten = np.rint((1 - fractions) * entries)
        kept = np.maximum(entries - forgotten, np.minimum(protected, entries))
        return _int64(np.minimum(kept, self.capped(entries)))

    def step(self, fractions: np.ndarray, seen: np.ndarray) -> np.ndarray:
        return _released_step(fractions, seen)


def _released_step(fractions: np.ndarray, seen: np.ndarray) -> np.ndarray:
    return np.asarray(np.ceil(seen * (1 - (1 - fractions))))


def _check_rows(rows: tuple[ProfileRow, ...]) -> None:
    keeps = [row.keep for row in rows]
    if not rows or keeps != sorted(set(keeps)):
        raise ParameterError("the profile's rows are not by rising keep")
    for row in rows:
        for number in (row.keep, *row.fractions):
            fraction("a number of the profile", number)
        if abs(math.fsum(row.fractions) / max(1, len(row.fractions)) - row.keep) > 1e-6:
            raise ParameterError(f"the profile's fractions at keep {row.keep} have another mean")


def _interpolated(rows: tuple[ProfileRow, ...], layers: int, keep: float) -> np.ndarray:
    """The share of each layer [L]: between the profile's rows, nothing and everything at its ends,
    so that the mean stays ``keep``."""
    some = [row for row in rows if row.keep < 1]
    keeps = [0.0, *(row.keep for row in some), 1.0]
    table = np.array([np.zeros(layers), *(row.fractions for row in some), np.ones(layers)])
    return np.array([np.interp(keep, keeps, column) for column in table.T])


def _apportion(share: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Integers [L] whose sum is that of ``share`` [L], rounded, as near to it as they can be.

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
