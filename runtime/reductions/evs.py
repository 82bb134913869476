"""EVS-like: of a video's frames what did not change goes (after arXiv 2510.14624)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from lvlm.runtime.reductions import no_others


class Evs:
    """Rule ``evs``: a video's first frame whole, of every other the tokens least like those at
    the same place of the frame before, by cosine; of equal ones the first. Stills stay whole.

    How a video's tokens are shared out among its frames is known before they are encoded: by how
    much their pixels changed since the frame before.
    """

    name = "evs"
    scored = False
    temporal = True

    def check(self, settings: Mapping[str, Any]) -> None:
        no_others(self.name, settings)

    def shared(
        self, frames: Sequence[np.ndarray], tokens: Sequence[int], total: int
    ) -> tuple[int, ...]:
        """Tokens of each frame: all of the first, at least one of each; they add up to ``total``,
        or to as few as that makes, in proportion to the mean change of the pixels.

        Args:
            frames: pixels as the vision graph takes them, of every frame.
            tokens: V of every frame.
            total: of all frames, at most their sum.
        """
        change = [_change(before, now) for before, now in pairwise(frames)]
        limits = np.array(tokens[1:])
        left = max(0, total - tokens[0] - len(limits))  # beyond one of each
        stay, weight = np.ones(len(limits), np.int64), np.array(change)
        if weight.sum() == 0:
            weight = np.ones(len(limits))
        while left > 0:
            open_ = (stay < limits) & (weight > 0)
            if not open_.any():
                weight = np.where(stay < limits, 1.0, 0.0)  # nothing else changed
                continue
            share = np.where(open_, weight, 0) * (left / weight[open_].sum())
            more = np.minimum(np.floor(share).astype(np.int64), limits - stay)
            if not more.any():  # less than one each: the largest shares first, of equal ones too
                first = np.argsort(-share, kind="stable")[: min(left, int(open_.sum()))]
                more[first] = 1
            stay, left = stay + more, left - int(more.sum())
        return (tokens[0], *stay.tolist())

    def reduce(
        self, features: np.ndarray, scores: np.ndarray | None, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """``scores``: the features of the frame before. What has no place in it stays first: the
        row's end behind LLaVA-OneVision's last frame."""
        assert scores is not None
        both = min(len(features), len(scores))
        now, before = features[:both], scores[:both]
        length = np.linalg.norm(now, axis=1) * np.linalg.norm(before, axis=1)
        same = np.full(len(features), -2, np.float32)  # below any cosine
        dot = np.einsum("vd,vd->v", now, before)
        same[:both] = dot / np.maximum(length, np.finfo(np.float32).tiny)
        rows = np.sort(np.argsort(same, kind="stable")[:count])
        return rows, features[rows]


def _change(before: np.ndarray, now: np.ndarray) -> float:
    """Mean absolute difference of pixels; of frames of different sizes: as if all had changed."""
    if before.shape != now.shape:
        return 1.0
    return float(np.abs(now.astype(np.float64) - before).mean())


RULE = Evs()
