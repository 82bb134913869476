"""Rows of a profile from samples, in one step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from lvlm.export.budgets.prefix_search import Importances, mean_rows, search_fractions
from lvlm.runtime.policies.shares import ProfileRow


def profile_rows(
    per_sample_importances: Iterable[Importances], keeps: Sequence[float]
) -> tuple[ProfileRow, ...]:
    """A row for each of ``keeps``: the samples' mean fractions, corrected to have mean keep."""
    found = [search_fractions(importances, keeps) for importances in per_sample_importances]
    return mean_rows(np.stack(found), keeps)
