"""The rows of the tables: recipes, and how much of image tokens and cache each is left.

Bundles have room for everything, so that one serves all cells of its rows: ``keep`` and ``kv_keep``
are options of the calls. Windows and floors are small enough for prompts of 600 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Group = Literal["once", "reductions", "caches", "both", "default", "more"]
LEFT = (0.33, 0.22, 0.11, 0.06)  # image tokens that enter the blocks, on average
KEPT = (0.5, 0.2, 0.1)  # cache entries
TOTAL = (0.2, 0.1)  # of the cache, with both
AT_DEFAULT = (0.7, 0.5)  # kv_keep behind lightvlm's default keep

WHOLE = ("keep=1.0",)
CACHE = ("kv_keep=1.0",)
OWN = ("kv_floor=16", "kv_protect=16")
SNAPKV = ("kv=snapkv", "kv.window=16")


@dataclass(frozen=True)
class TableRow:
    """A line of the tables: a recipe with its settings."""

    group: Group
    recipe: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A row with ``left`` of the image tokens (None: as exported, as the row's own ``keep`` says)
    and ``kept`` of what these leave in the cache (None: all, or no cache policy)."""

    name: str
    row: TableRow
    left: float | None = None
    kept: float | None = None


ROWS: dict[str, TableRow] = {
    "none": TableRow("once", "none"),
    "divprune": TableRow("reductions", "divprune", WHOLE),
    "visionzip": TableRow("reductions", "visionzip", WHOLE),
    "hybrid": TableRow("reductions", "hybrid", WHOLE),
    "lightvlm": TableRow("reductions", "lightvlm", (*WHOLE, *CACHE, *OWN)),
    "pyramiddrop": TableRow("reductions", "pyramiddrop", WHOLE),
    "fastv": TableRow("reductions", "fastv", WHOLE),
    "random": TableRow("reductions", "random", WHOLE),
    "strided": TableRow("reductions", "strided", WHOLE),
    "interval": TableRow("caches", "lightvlm", (*WHOLE, *CACHE, *OWN)),
    "snapkv": TableRow("caches", "snapkv", (*CACHE, "window=16")),
    "pyramidkv": TableRow("caches", "pyramidkv", CACHE),
    "pyramidkv, window 16": TableRow("caches", "pyramidkv", (*CACHE, "window=16")),
    "uniform": TableRow("caches", "uniform", CACHE),
    "prefixkv": TableRow("caches", "prefixkv", CACHE),
    "elastic-cache": TableRow("caches", "elastic-cache", CACHE),
    "streaming-llm": TableRow("caches", "streaming-llm", CACHE),
    "tova": TableRow("caches", "tova", CACHE),
    "h2o": TableRow("caches", "h2o", CACHE),
    "lightvlm + interval": TableRow("both", "lightvlm", (*WHOLE, *CACHE, *OWN)),
    "lightvlm + snapkv": TableRow("both", "lightvlm", (*WHOLE, *CACHE, *SNAPKV)),
    "divprune + interval": TableRow("both", "divprune", (*WHOLE, *CACHE, "kv=interval", *OWN)),
    "divprune + snapkv": TableRow("both", "divprune", (*WHOLE, *CACHE, *SNAPKV)),
    "strided + snapkv": TableRow("both", "strided", (*WHOLE, *CACHE, *SNAPKV)),
    "hybrid + interval": TableRow("both", "hybrid", (*WHOLE, *CACHE, "kv=interval", *OWN)),
    "at 0.35: whole cache": TableRow("once", "lightvlm", CACHE),
    "at 0.35: interval": TableRow("default", "lightvlm", CACHE),
    "at 0.35: interval, 64 queries": TableRow("default", "lightvlm", (*CACHE, "kv_protect=64")),
    "at 0.35: snapkv": TableRow("default", "lightvlm", (*CACHE, *SNAPKV)),
    "at 0.35: prefixkv": TableRow("default", "lightvlm", (*CACHE, "kv=prefixkv")),
    # What was tried beside: run where it is named
    "divprune, closed up": TableRow("more", "divprune", (*WHOLE, "places=closed")),
    "hybrid of visionzip": TableRow("more", "hybrid", (*WHOLE, "encoder=visionzip")),
    "lightvlm, drop": TableRow("more", "lightvlm", (*WHOLE, "kv=none", "merge=drop")),
    "lightvlm, nearest": TableRow("more", "lightvlm", (*WHOLE, "kv=none", "merge=nearest")),
    "lightvlm, last": TableRow("more", "lightvlm", (*WHOLE, "kv=none", "importance=last")),
    "lightvlm, both": TableRow("more", "lightvlm", (*WHOLE, "kv=none", "importance=both")),
    "lightvlm at 2, 4": TableRow("more", "lightvlm", (*WHOLE, "kv=none", "stages=[2,4]")),
    "lightvlm at 2, 4, 6": TableRow("more", "lightvlm", (*WHOLE, "kv=none", "stages=[2,4,6]")),
}
USUAL = tuple(name for name, row in ROWS.items() if row.group != "more")


def cells(
    names: Sequence[str],
    left: Sequence[float] = LEFT,
    kept: Sequence[float] = KEPT,
    total: Sequence[float] = TOTAL,
) -> Iterator[Cell]:
    """The cells of rows; those of ``none`` first."""
    for name in dict.fromkeys(("none", *names)):
        row = ROWS[name]
        if row.group == "once":
            yield Cell(name, row)
        elif row.group in ("reductions", "more"):
            yield from (Cell(name, row, part) for part in left)
        elif row.group == "caches":
            yield from (Cell(name, row, None, part) for part in kept)
        elif row.group == "default":
            yield from (Cell(name, row, None, part) for part in AT_DEFAULT)
        else:
            yield from (Cell(name, row, math.sqrt(part), math.sqrt(part)) for part in total)
