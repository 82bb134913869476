"""DivPrune: tokens as unlike each other as can be (arXiv 2503.02175, CVPR 2025)."""

from __future__ import annotations

import numpy as np

from lvlm.runtime.reductions import Chosen


class DivPrune(Chosen):
    """Rule ``divprune``: greedily the largest least cosine distance between any two that stay.

    First the token whose nearest neighbour is farthest, then again and again the one that is
    farthest from the nearest of those that were chosen; of equal ones the first.
    """

    name = "divprune"

    def choose(self, features: np.ndarray, count: int) -> np.ndarray:
        length = np.sqrt(np.einsum("vd,vd->v", features, features, dtype=np.float32))
        unit = features / np.maximum(length, np.finfo(np.float32).tiny)[:, None]
        distance = 1 - unit @ unit.T
        np.fill_diagonal(distance, np.inf)
        chosen = [int(distance.min(axis=1).argmax())]
        nearest = distance[chosen[0]].copy()
        nearest[chosen[0]] = -np.inf
        while len(chosen) < count:
            chosen.append(int(nearest.argmax()))
            np.minimum(nearest, distance[chosen[-1]], out=nearest)
            nearest[chosen[-1]] = -np.inf
        return np.sort(np.array(chosen))


RULE = DivPrune()
