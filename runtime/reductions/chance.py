"""Tokens by chance: a strong baseline (UniPruneBench, arXiv 2511.02650)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lvlm.core.ranges import integer
from lvlm.runtime.reductions import Chosen, no_others


class Chance(Chosen):
    """Rule ``random``: the same tokens of every image of as many, drawn from ``seed``."""

    name = "random"

    def check(self, settings: Mapping[str, Any]) -> None:
        no_others(self.name, settings, ["seed"])
        integer("seed", settings.get("seed", 0), 0)

    def choose(self, features: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
        order = np.random.default_rng([seed, len(features)]).permutation(len(features))
        return np.sort(order[:count])


RULE = Chance()
