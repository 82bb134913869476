"""Selections: how cache entries that do not stay are treated (policy.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


class EntrySelection:
    """Base of all selections.

    mode             CacheCompact's name for it (export/ops/cache_compact)
    evicts           True where entries that do not stay are gone
    within_modality  True where the entries on both sides of every border between text and image
                     stay before any others
    """

    mode: ClassVar[Literal["evict", "merge", "merge-reference"]]
    evicts: ClassVar[bool] = False
    within_modality: bool = False


@dataclass(frozen=True)
class Evict(EntrySelection):
    """Entries that do not stay are gone."""

    kind: Literal["evict"] = "evict"
    mode: ClassVar[Literal["evict"]] = "evict"
    evicts: ClassVar[bool] = True


@dataclass(frozen=True)
class Merge(EntrySelection):
    """Each goes into the nearest one that stays, by index; that becomes the plain mean of all it
    took over, itself included (Elastic Cache).

    within_modality  the entries on both sides of every border between text and image stay before
                     any others, so that none merges across it (EffiVLM-Bench, arXiv 2506.00479)
    """

    within_modality: bool = False
    kind: Literal["merge"] = "merge"
    mode: ClassVar[Literal["merge"]] = "merge"


@dataclass(frozen=True)
class ReleasedMerge(EntrySelection):
    """Merging as in Elastic Cache's released code."""

    kind: Literal["released-merge"] = "released-merge"
    mode: ClassVar[Literal["merge-reference"]] = "merge-reference"


Select = Evict | Merge | ReleasedMerge
