"""PyramidKV: SnapKV's choice, with more of the cache in the first layers (arXiv 2406.02069).

Lower layers spread their attention over the prompt, upper ones gather it on few tokens, so shares
fall evenly from the first layer to the last. Nothing is measured for it: the slope is a constant.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from lvlm.export.recipes.recipe import parameter
from lvlm.export.recipes.snapkv import SnapKV
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.shares import Slope


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Recipe ``pyramidkv``."""

    name: ClassVar[str] = "pyramidkv"
    summary: ClassVar[str] = "as snapkv, with shares that fall from the first layer to the last"
    source: ClassVar[str] = "PyramidKV, arXiv 2406.02069"

    window: int = parameter(8, "last prompt tokens, which stay and whose queries rank the others")
    beta: float = parameter(20.0, "how many times the last layer's share goes into the mean one")

    def cache_policy(self) -> CachePolicy:
        budget = Slope(self.kv_keep, self.kv_cap, self.beta)
        return dataclasses.replace(super().cache_policy(), budget=budget)


RECIPE = PyramidKV
