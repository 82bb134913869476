"""Evictions in decode: when cache entries leave while an answer is written (policy.py).

Elimination one by one is Elastic Cache's fixed point (arXiv 2407.18121, section 3.3), or the oldest
entry after the sinks (StreamingLLM, arXiv 2309.17453). In what follows L are the layers, B the
rows; counts are int64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np

from lvlm.core.ranges import integer

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11


class Counts(Protocol):
    """The counts of one call that all variants need (budgets.Budgets)."""

    @property
    def protected(self) -> int: ...

    def share(self, entries: np.ndarray) -> np.ndarray:
        """Entries [L,B] that the budget leaves of a prompt's ``entries`` [L,B]."""
        ...

    def prompt(self, entries: np.ndarray) -> np.ndarray:
        """Entries [L,B] that prefill leaves of them."""
        ...

    def step(self, seen: np.ndarray) -> np.ndarray:
        """Entries [L,B] that may stay of all ``seen`` [L,B] so far."""
        ...


class EntryEviction:
    """Base of all evictions: what one says of itself, and its counts.

    one_by_one  True where an entry leaves as soon as there is one too many; else new entries only
                go behind the others
    released    True for what released code of a paper does; goes with such a budget only
    floor       entries that a layer never has less than
    """

    one_by_one: ClassVar[bool] = False
    released: ClassVar[bool] = False
    floor: int = 0

    @property
    def interval(self) -> int | None:
        """Steps from one run of compact.onnx to the next; None: it has no use."""
        return None

    def at_most_every(self, steps: int) -> Self:
        """The same with at most so many ``steps`` to the first run of compact.onnx."""
        del steps
        return self

    def prompt(self, counts: Counts, entries: np.ndarray) -> np.ndarray:
        """Entries [L,B] that prefill leaves of a prompt's ``entries`` [L,B]."""
        return counts.share(entries)

    def min_entries(self, sinks: int, protected: int) -> int:
        """Entries that stay in decode, whatever the budget."""
        del sinks
        return protected

    def capacity(self, counts: Counts, entries: np.ndarray, new_tokens: np.ndarray) -> np.ndarray:
        """Slots [L,B] that rows of ``entries`` [L,B] occupy with ``new_tokens`` [B] fed to
        decode."""
        raise NotImplementedError

    def limit(self, counts: Counts, seen: np.ndarray, new_tokens: int) -> np.ndarray:
        """Slots [L] that ``seen`` [L] entries ever occupy, of which up to ``new_tokens`` are fed to
        decode and the others are the prompt's."""
        raise NotImplementedError

    def point(self, kept: np.ndarray, sinks: int) -> np.ndarray:
        """Index [L,B] by age of the entry that leaves where they leave ``one_by_one``; ``kept``
        [L,B] of the prompt. From ``kept`` on entries are of the answer."""
        raise NotImplementedError


@dataclass(frozen=True)
class Append(EntryEviction):
    """None leaves: the prompt was compacted once, and each new entry goes behind the others."""

    kind: Literal["append"] = "append"

    def capacity(self, counts: Counts, entries: np.ndarray, new_tokens: np.ndarray) -> np.ndarray:
        return np.asarray(counts.prompt(entries) + new_tokens)

    def limit(self, counts: Counts, seen: np.ndarray, new_tokens: int) -> np.ndarray:
        # The shorter the prompt, the less of it is dropped; by a profile, for some layers, the
        # longer. One layer may get a remainder more.
        shortest = np.maximum(seen - new_tokens, 1)
        kept = counts.prompt(np.stack([shortest, seen], axis=1))
        highest = np.maximum(kept[:, 0] + new_tokens, kept[:, 1])
        return np.asarray(np.minimum(seen, highest + 1))


class OneByOne(EntryEviction):
    """Eviction one by one: as soon as a step leaves one entry too many, the next token overwrites
    one."""

    one_by_one: ClassVar[bool] = True

    def min_entries(self, sinks: int, protected: int) -> int:
        """At the fixed point only the sinks are protected."""
        del protected
        return max(1, sinks)

    def capacity(self, counts: Counts, entries: np.ndarray, new_tokens: np.ndarray) -> np.ndarray:
        kept = counts.prompt(entries)
        # The last token found its layer at its length a step before, plus one for the victim.
        grown = np.minimum(kept + new_tokens, counts.step(entries + new_tokens - 1) + 1)
        return np.where(new_tokens > 0, np.maximum(kept + 1, grown), kept)

    def limit(self, counts: Counts, seen: np.ndarray, new_tokens: int) -> np.ndarray:
        del new_tokens
        step, prompt = counts.step(seen[:, None])[:, 0], counts.prompt(seen[:, None])[:, 0]
        highest = np.maximum(np.maximum(step, prompt), counts.protected)
        return np.asarray(np.minimum(seen, highest + 1))


@dataclass(frozen=True)
class FixedPoint(OneByOne):
    """The entry at a constant index leaves: ``distance`` before the end of what was kept of the
    prompt, or in its middle where it is no longer than that."""

    distance: int
    kind: Literal["fixed-point"] = "fixed-point"

    def __post_init__(self) -> None:
        integer("distance", self.distance, 0)

    def point(self, kept: np.ndarray, sinks: int) -> np.ndarray:
        """Index of the entry that leaves. Where only sinks are left of the prompt, the answer's
        oldest."""
        point = np.maximum(_before_the_end(kept, self.distance), sinks)
        return np.asarray(np.minimum(point, kept), np.int64)


@dataclass(frozen=True)
class Oldest(OneByOne):
    """The oldest entry after the sinks leaves: a window that slides. The first tokens are sinks
    also where an answer has to give some of them, after a prompt that is shorter."""

    kind: Literal["oldest"] = "oldest"

    def min_entries(self, sinks: int, protected: int) -> int:
        """The sinks and a window of one."""
        del protected
        return sinks + 1

    def point(self, kept: np.ndarray, sinks: int) -> np.ndarray:
        return np.full_like(kept, sinks, np.int64)


@dataclass(frozen=True)
class ReleasedFixedPoint(OneByOne):
    """The fixed point as the released code of two papers has it: it guards no sink."""

    distance: int
    kind: Literal["released-fixed-point"] = "released-fixed-point"
    released: ClassVar[bool] = True

    def __post_init__(self) -> None:
        integer("distance", self.distance, 0)

    def min_entries(self, sinks: int, protected: int) -> int:
        del sinks, protected
        return 1

    def point(self, kept: np.ndarray, sinks: int) -> np.ndarray:
        del sinks
        return np.asarray(_before_the_end(kept, self.distance), np.int64)


@dataclass(frozen=True)
class Interval(EntryEviction):
    """Every ``steps`` steps compact.onnx drops all that are too many; a layer never has less than
    ``floor``."""

    steps: int
    floor: int = 0
    kind: Literal["interval"] = "interval"

    def __post_init__(self) -> None:
        integer("kv_interval", self.steps, 1)
        integer("kv_floor", self.floor, 0)

    @property
    def interval(self) -> int:
        return self.steps

    def at_most_every(self, steps: int) -> Interval:
        return replace(self, steps=min(self.steps, steps))

    def prompt(self, counts: Counts, entries: np.ndarray) -> np.ndarray:
        return counts.step(entries)

    def capacity(self, counts: Counts, entries: np.ndarray, new_tokens: np.ndarray) -> np.ndarray:
        # Every run of compact.onnx ends at the budget, where prefill ended too.
        runs, rest = new_tokens // self.steps, new_tokens % self.steps
        before = counts.step(entries + np.maximum(runs - 1, 0) * self.steps) + self.steps
        after = counts.step(entries + runs * self.steps) + rest
        return np.asarray(np.where(runs > 0, np.maximum(before, after), after))

    def limit(self, counts: Counts, seen: np.ndarray, new_tokens: int) -> np.ndarray:
        del new_tokens
        highest = counts.step(seen[:, None])[:, 0]
        return np.asarray(np.minimum(seen, highest + self.steps))


def _before_the_end(kept: np.ndarray, distance: int) -> np.ndarray:
    return np.where(kept <= distance, kept // 2, kept - distance)
