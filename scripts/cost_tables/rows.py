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
class Row:
    """A line of the tables: a recipe with its settings."""

    group: Group
    recipe: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A row with ``left`` of the image tokens (None: as exported, as the row's own ``keep`` says)
    and ``kept`` of what these leave in the cache (None: all, or no cache policy)."""

    name: str
    row: Row
    left: float | None = None
    kept: float | None = None


ROWS: dict[str, Row] = {
    "none": Row("once", "none"),
    "divprune": Row("reductions", "divprune", WHOLE),
    "visionzip": Row("reductions", "visionzip", WHOLE),
    "hybrid": Row("reductions", "hybrid", WHOLE),
    "lightvlm": Row("reductions", "lightvlm", (*WHOLE, *CACHE, *OWN)),
    "pyramiddrop": Row("reductions", "pyramiddrop", WHOLE),
    "fastv": Row("reductions", "fastv", WHOLE),
    "random": Row("reductions", "random", WHOLE),
    "strided": Row("reductions", "strided", WHOLE),
    "interval": Row("caches", "lightvlm", (*WHOLE, *CACHE, *OWN)),
    "snapkv": Row("caches", "snapkv", (*CACHE, "window=16")),
    "pyramidkv": Row("caches", "pyramidkv", CACHE),
    "uniform": Row("caches", "uniform", CACHE),
    "prefixkv": Row("caches", "prefixkv", CACHE),
    "elastic-cache": Row("caches", "elastic-cache", CACHE),
    "streaming-llm": Row("caches", "streaming-llm", CACHE),
    "tova": Row("caches", "tova", CACHE),
    "h2o": Row("caches", "h2o", CACHE),
    "lightvlm + interval": Row("both", "lightvlm", (*WHOLE, *CACHE, *OWN)),
    "lightvlm + snapkv": Row("both", "lightvlm", (*WHOLE, *CACHE, *SNAPKV)),
    "divprune + interval": Row("both", "divprune", (*WHOLE, *CACHE, "kv=interval", *OWN)),
    "divprune + snapkv": Row("both", "divprune", (*WHOLE, *CACHE, *SNAPKV)),
    "hybrid + interval": Row("both", "hybrid", (*WHOLE, *CACHE, "kv=interval", *OWN)),
    "at 0.35: whole cache": Row("once", "lightvlm", CACHE),
    "at 0.35: interval": Row("default", "lightvlm", CACHE),
    "at 0.35: interval, 64 queries": Row("default", "lightvlm", (*CACHE, "kv_protect=64")),
    "at 0.35: snapkv": Row("default", "lightvlm", (*CACHE, *SNAPKV)),
    "at 0.35: prefixkv": Row("default", "lightvlm", (*CACHE, "kv=prefixkv")),
    # What was tried beside: run where it is named
    "divprune, closed up": Row("more", "divprune", (*WHOLE, "places=closed")),
    "hybrid of visionzip": Row("more", "hybrid", (*WHOLE, "encoder=visionzip")),
    "lightvlm, drop": Row("more", "lightvlm", (*WHOLE, "kv=none", "merge=drop")),
    "lightvlm, nearest": Row("more", "lightvlm", (*WHOLE, "kv=none", "merge=nearest")),
    "lightvlm, last": Row("more", "lightvlm", (*WHOLE, "kv=none", "importance=last")),
    "lightvlm, both": Row("more", "lightvlm", (*WHOLE, "kv=none", "importance=both")),
    "lightvlm at 2, 4": Row("more", "lightvlm", (*WHOLE, "kv=none", "stages=[2,4]")),
    "lightvlm at 2, 4, 6": Row("more", "lightvlm", (*WHOLE, "kv=none", "stages=[2,4,6]")),
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
