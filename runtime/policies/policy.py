"""A cache policy: which entries of the KV cache stay, composed of four parts.

    CachePolicy = score x select x decode x budget      (and what is protected, and positions)

score    what ranks a layer's entries after prefill, and before each run of compact.onnx (scores.py)
           AllQueries  the attention of all prompt queries
           Accumulated  that of all queries so far: the sums go on in decode
           Latest      that of the newest query alone, as decode finds it
           Window      that of the most recent queries, as it is or pooled over neighbouring
                       positions, of all heads together or of each key head on its own
           Recency     nothing is read: the newer, the better
select   how the entries that do not stay are treated: Evict, or Merge into their neighbours
         (selections.py)
decode   when an entry leaves while an answer is written (evictions.py)
           Append      never
           FixedPoint, Oldest    one by one, as soon as there is one too many
           Interval    many at once, every so many steps, by compact.onnx
budget   how many entries a layer keeps (shares.py): Uniform, Slope, Profile, Mixed

A variant is a frozen dataclass, and all there is to know about it stands in one place: its numbers
are checked where it is made (a recipe makes it while the command line is parsed), its counts and
what it needs of a graph are its methods; the graph code of a score is the function for its type in
export/recipes/parts/score_graphs.py. What does not go together, ``CachePolicy`` refuses when it is
put together. The manifest holds a policy as it is, every part with its ``kind``; a reader decodes
it to the same objects, with the same checks. Nothing of this needs torch.

The released code of two papers deviates from the papers. What it does are variants of their own
(Released...), which exist for parity tests only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lvlm.core.errors import ParameterError
from lvlm.core.ranges import integer
from lvlm.runtime.policies.evictions import (
    Append,
    FixedPoint,
    Interval,
    Oldest,
    ReleasedFixedPoint,
)
from lvlm.runtime.policies.scores import Score
from lvlm.runtime.policies.selections import Select
from lvlm.runtime.policies.shares import (
    Mixed,
    Profile,
    ReleasedProfile,
    ReleasedUniform,
    Slope,
    Uniform,
)

Decode = Append | FixedPoint | Oldest | Interval | ReleasedFixedPoint
Budget = Uniform | Slope | Profile | Mixed | ReleasedUniform | ReleasedProfile


@dataclass(frozen=True)
class CachePolicy:
    """A cache policy: which entries of the KV cache stay.

    sinks      first tokens, which always stay
    recent     last tokens, which stay when a prompt or an interval is compacted
    positions  of new tokens: the true ones, or the length of layer 0's cache (released code)

    Raises ParameterError where parts do not go together.
    """

    score: Score
    select: Select
    decode: Decode
    budget: Budget
    sinks: int = 0
    recent: int = 1
    positions: Literal["true", "layer0"] = "true"

    def __post_init__(self) -> None:
        integer("kv_sinks", self.sinks, 0)
        integer("recent entries", self.recent, 0)
        if self.protected == 0:
            raise ParameterError("no entry is protected; keep at least one sink or recent one")
        self.budget.check_cap(self.protected)
        window = self.score.window
        if window > self.recent:
            raise ParameterError(
                f"{window} queries rank the entries, but only the last {self.recent} entries are "
                "protected; a query's own entry must stay"
            )
        if self.interval is not None and window == 0 and not self.received:
            raise ParameterError(
                "compaction at intervals is ranked by the latest queries or by sums over all; give "
                "a window, or a score that goes on"
            )
        if self.received and (self.interval is None or not self.select.evicts):
            raise ParameterError(
                "scores that go on in decode are for entries that are evicted at intervals"
            )
        if self.select.within_modality and self.interval is not None:
            raise ParameterError(
                "within_modality is for a prompt that is compacted once; at intervals nobody knows "
                "any more what is an image's"
            )
        if self.budget.released != self.decode.released:
            raise ParameterError("the released code's budget goes with its own elimination only")

    @property
    def protected(self) -> int:
        """Entries that every compaction leaves: the first ones and the last ones."""
        return self.sinks + self.recent

    @property
    def queries(self) -> int:
        """Most recent queries that each layer remembers in a ring, for what is ranked later."""
        return self.score.window if self.interval is not None else 0

    @property
    def received(self) -> bool:
        """True where each entry has beside it the attention that it got, also in decode."""
        return self.score.received

    @property
    def sums(self) -> bool:
        """True where that is a sum over all queries so far."""
        return self.score.sums

    @property
    def interval(self) -> int | None:
        """Steps from one run of compact.onnx to the next; None: it has no use."""
        return self.decode.interval

    def check_layers(self, layers: int) -> None:
        """ParameterError unless it is for a model of so many ``layers``."""
        self.budget.check_layers(layers)

    def whole(self) -> CachePolicy:
        """The same, but every entry stays as long as kv_keep is 1."""
        return replace(self, budget=self.budget.whole())

    def keeping_less(self, keep: float) -> CachePolicy:
        """The same with ``keep`` of the entries, if all of them stay."""
        if self.budget.keep < 1:
            return self
        return replace(self, budget=replace(self.budget, keep=keep))

    def at_most_every(self, steps: int) -> CachePolicy:
        """The same with at most so many ``steps`` to the first run of compact.onnx."""
        return replace(self, decode=self.decode.at_most_every(steps))
