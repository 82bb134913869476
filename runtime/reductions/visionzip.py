"""VisionZip: what the vision tower looks at stays, the rest is merged (arXiv 2412.04467)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lvlm.core.errors import ParameterError, shown
from lvlm.core.rounding import rounded
from lvlm.runtime.reductions import no_others

MERGED = 10 / 64  # of the tokens that go on


class VisionZip:
    """Rule ``visionzip``.

    The tokens that the tower attends to most are dominant and stay as they are. Of the others, in
    order, some at a uniform stride are targets; each that is left goes to the target whose key is
    most like its own by cosine, and a target becomes itself plus the mean of those that came to it.
    """

    name = "visionzip"
    scored = True
    temporal = False

    def check(self, settings: Mapping[str, Any]) -> None:
        no_others(self.name, settings, ["merged"])
        merged = settings.get("merged", MERGED)
        if type(merged) not in (int, float) or not 0 <= merged < 1:
            raise ParameterError(f"merged is {shown(merged)}; give a number from 0 to below 1")

    def reduce(
        self, features: np.ndarray, scores: np.ndarray | None, count: int, *, merged: float = MERGED
    ) -> tuple[np.ndarray, np.ndarray]:
        """``merged``: the part of the ``count`` that are targets."""
        assert scores is not None
        targets = min(rounded(merged * count), count - 1)
        order = np.argsort(-scores[:, 0], kind="stable")
        dominant, others = order[: count - targets], np.sort(order[count - targets :])
        if not targets:
            rows = np.sort(dominant)
            return rows, features[rows]
        at = np.arange(targets) * (len(others) // targets)
        loose, target = np.delete(others, at), others[at]
        keys = scores[:, 1:] / np.maximum(np.linalg.norm(scores[:, 1:], axis=1), 1e-12)[:, None]
        out = features.copy()
        if len(loose):
            mine = (keys[loose] @ keys[target].T).argmax(axis=1)
            for number, place in enumerate(target):
                own = loose[mine == number]
                if len(own):
                    out[place] += features[own].mean(axis=0)
        rows = np.sort(np.concatenate([dominant, target]))
        return rows, out[rows]


RULE = VisionZip()
