"""Selection of cache entries, dropped or merged: a parameter of recipes that compact once."""

from __future__ import annotations

from typing import Literal

from lvlm.export.recipes.recipe import choice
from lvlm.runtime.policies.selections import Evict, Merge, Select

Selection = Literal["evict", "merge"]
SELECT = "evict, or merge: each goes into the nearest that stays, as with elastic-cache"


def selection(name: Selection) -> Select:
    """The part of a policy that ``select`` names. Raises ParameterError."""
    choice("select", name, Selection)
    return Merge() if name == "merge" else Evict()
