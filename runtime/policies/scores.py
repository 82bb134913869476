"""Scores: the number by which a layer's cache entries are ranked (policy.py).

Each says what a graph has to hand over for it; its own graph code is a function for its type in
export/recipes/parts/score_graphs.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lvlm.core.errors import ParameterError
from lvlm.core.ranges import integer


class EntryScore:
    """Base of all scores: what one needs of a graph; the variants say what is different.

    over_prompt  True where all of the prompt's queries score
    received     True where each entry has beside it the attention that it got, also in decode
    sums         True where that is a sum over all queries so far
    window       how many most recent queries rank the entries, also after prefill
    """

    over_prompt: ClassVar[bool] = False
    received: ClassVar[bool] = False
    sums: ClassVar[bool] = False

    @property
    def window(self) -> int:
        return 0

    @property
    def prompt_window(self) -> int:
        """Number of a prompt's last queries that rank its entries."""
        return self.window


@dataclass(frozen=True)
class AllQueries(EntryScore):
    """Entries rank by the attention of all prompt queries, mean over the heads."""

    kind: Literal["all-queries"] = "all-queries"
    over_prompt: ClassVar[bool] = True


@dataclass(frozen=True)
class Accumulated(EntryScore):
    """Entries rank by the attention of all queries so far, mean over the heads: the prompt's, and
    as an answer is written each new token's. The sums lie beside the cache, one per entry."""

    kind: Literal["accumulated"] = "accumulated"
    over_prompt: ClassVar[bool] = True
    received: ClassVar[bool] = True
    sums: ClassVar[bool] = True


@dataclass(frozen=True)
class Latest(EntryScore):
    """Entries rank by the attention of the newest query, mean over the heads. What decode finds
    lies beside the cache, one number per entry, until the next token's takes its place."""

    kind: Literal["latest"] = "latest"
    received: ClassVar[bool] = True

    @property
    def prompt_window(self) -> int:
        return 1


@dataclass(frozen=True)
class Window(EntryScore):
    """Entries rank by the attention of the ``queries`` most recent tokens.

    kernel    above 1, an odd number: scores of the entries before the protected last ones are
              pooled over that many neighbouring positions, so that what surrounds an important
              entry stays, too; beyond the ends are zeros
    pool      the mean over these, or the max
    per_head  each key head ranks its entries by its own query heads and keeps its own; else all
              heads keep the same, by their mean
    """

    queries: int
    kernel: int = 1
    pool: Literal["mean", "max"] = "mean"
    per_head: bool = False
    kind: Literal["window"] = "window"

    def __post_init__(self) -> None:
        integer("window", self.queries, 1)
        integer("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ParameterError(
                f"kernel is {self.kernel}; give an odd number, so that it has a middle"
            )
        if self.pool not in ("mean", "max"):
            raise ParameterError(f"pool is {self.pool!r}; give mean or max")

    @property
    def window(self) -> int:
        return self.queries


@dataclass(frozen=True)
class Recency(EntryScore):
    """Entries rank by their position, whatever attends to them: the last ones stay."""

    kind: Literal["recency"] = "recency"


Score = AllQueries | Accumulated | Latest | Window | Recency
