"""Cache budgets: how many entries stay, every count of one call, from the manifest alone.

The graphs rank entries and move them; how many stay is decided here, so that the host knows every
length without asking the device. What is counted how is the policy's parts' own (shares.py,
evictions.py).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from lvlm.core.errors import ParameterError
from lvlm.core.ranges import fraction
from lvlm.runtime.policies.policy import CachePolicy


@dataclass(frozen=True)
class Budgets:
    """Cache budgets of a call: how many entries each layer keeps.

    ``fractions`` float64 [L,1], each layer's share, or [L,B] where rows have their own; ``keep``,
    the call's share of all entries. In what follows L are the layers, B the rows; counts are int64.
    """

    cache_policy: CachePolicy | None
    fractions: np.ndarray
    keep: float

    @classmethod
    def of(cls, cache_policy: CachePolicy | None, layers: int, kv_keep: float | None) -> Budgets:
        """Budgets of a call; ``kv_keep`` None: as exported. ParameterError: not in (0, 1], or
        below 1 for a bundle without compression."""
        keep = None if kv_keep is None else fraction("kv_keep", kv_keep)
        if cache_policy is None:
            if keep not in (None, 1.0):
                raise ParameterError(
                    f"kv_keep={keep} needs a bundle with cache compression; export with a recipe "
                    "that compresses (lvlm-export --help-recipe lists them)"
                )
            return cls(None, np.ones((layers, 1)), 1.0)
        budget = cache_policy.budget
        keep = budget.keep if keep is None else keep
        return cls(cache_policy, budget.fractions(layers, keep)[:, None], keep)

    def prompt(self, entries: np.ndarray) -> np.ndarray:
        """Entries [L,B] that prefill leaves of the ``entries`` [L,B] that entered each layer."""
        c = self.cache_policy
        return entries.astype(np.int64) if c is None else c.decode.prompt(self, entries)

    def share(self, entries: np.ndarray) -> np.ndarray:
        """Entries [L,B] that the budget alone leaves of them."""
        assert self.cache_policy is not None
        budget = self.cache_policy.budget
        return budget.prompt(self.fractions, self.keep, entries, self.protected)

    def step(self, seen: np.ndarray) -> np.ndarray:
        """Entries [L,B] that may stay in decode when a layer has cached ``seen`` [L,B] so far.

        One token more raises it by at most one.
        """
        c = self.cache_policy
        if c is None:
            return seen.astype(np.int64)
        share = np.maximum(c.budget.step(self.fractions, seen), c.decode.floor)
        lowest = c.decode.min_entries(c.sinks, c.protected)
        return _int64(np.clip(share, np.minimum(lowest, seen), c.budget.capped(seen)))

    def fixed_point(self, kept: np.ndarray) -> np.ndarray:
        """Index [L,B] by age of the entry that elimination one by one removes; ``kept`` [L,B] of
        the prompt."""
        assert self.cache_policy is not None
        return self.cache_policy.decode.point(kept, self.cache_policy.sinks)

    def capacity(self, entries: np.ndarray, new_tokens: np.ndarray) -> np.ndarray:
        """Slots per layer [L] that rows of ``entries`` [L,B] ever occupy, the largest row's.

        ``new_tokens`` [B] counts the tokens fed to decode (the last one chosen is not).
        """
        c = self.cache_policy
        if c is None:
            slots = self.prompt(entries) + new_tokens
        else:
            slots = c.decode.capacity(self, entries, new_tokens)
        return _int64(slots.max(axis=1))

    def limit(self, seen: np.ndarray, new_tokens: int) -> np.ndarray:
        """Slots per layer [L] that ``seen`` [L] entries ever occupy, however many of them are the
        prompt's: what an export lays out. At most ``new_tokens`` are fed to decode."""
        c = self.cache_policy
        return seen.astype(np.int64) if c is None else c.decode.limit(self, seen, new_tokens)

    def room(self, entries: np.ndarray, capacities: np.ndarray, max_tokens: int) -> int:
        """Tokens up to ``most`` that one row of ``entries`` [L] may be fed within ``capacities``
        [L]; 0 if none."""

        def full(tokens: int) -> bool:
            needed = self.capacity(np.asarray(entries)[:, None], np.array([tokens]))
            return bool((needed > capacities).any())

        return bisect_left(range(1, max_tokens + 1), True, key=full)

    @property
    def protected(self) -> int:
        """Entries that every compaction leaves: the first ones and the last ones."""
        return 0 if self.cache_policy is None else self.cache_policy.protected


def _int64(counts: np.ndarray) -> np.ndarray:
    return np.asarray(counts, np.int64)
