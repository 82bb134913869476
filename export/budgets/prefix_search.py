"""PrefixKV budgets: how much of its cache each layer keeps, found from importances.

One global threshold p decides (arXiv 2412.03409): each layer keeps the smallest prefix of its
entries, by falling importance, that holds the share p of the layer's importance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from lvlm.core.errors import ParameterError
from lvlm.runtime.policies.shares import ProfileRow

Importances: TypeAlias = Sequence[npt.NDArray[Any] | torch.Tensor]  # [N_l] of every layer
GRID = tuple(round(0.05 * i, 2) for i in range(1, 20))


def search(importances: Importances, keep: float) -> npt.NDArray[np.int64]:
    """Search for the entries each layer keeps of one prompt: [L] int64, each at least 1.

    Their sum is exactly round(keep * sum N_l), or L if that is less. Lengths N_l may differ. This
    is where bisecting the threshold ends; layers whose next entry needs the same threshold get it
    from the lowest on. Raises ParameterError for a keep or an importance that is out of range.
    """
    return _counts(*_steps(importances), keep)


def search_fractions(importances: Importances, keeps: Sequence[float]) -> npt.NDArray[np.float64]:
    """``search`` for each of ``keeps``, as fractions of the layers' lengths: [K,L]."""
    lengths, steps = _steps(importances)
    return np.stack([_counts(lengths, steps, keep) / lengths for keep in keeps])


def _steps(importances: Importances) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Lengths [L], and the layer that grows by one entry at each step of a rising threshold."""
    shares = [_shares(s, layer) for layer, s in enumerate(importances)]
    if not shares:
        raise ParameterError("there is no layer to search budgets for")
    lengths = np.array([len(p) for p in shares])
    # A layer keeps o + 1 entries instead of o once the threshold exceeds the share of o.
    layer = np.repeat(np.arange(len(shares)), lengths - 1)
    return lengths, layer[np.lexsort((layer, np.concatenate([p[:-1] for p in shares])))]


def _shares(importance: npt.NDArray[Any] | torch.Tensor, layer: int) -> npt.NDArray[np.float64]:
    """The share [N] that each prefix by falling importance holds; the last is 1."""
    values = np.asarray(importance, np.float64)
    if values.ndim != 1 or not len(values):
        raise ParameterError(f"importances of layer {layer} have shape {values.shape}; give [N]")
    total = np.cumsum(-np.sort(-values))
    if not (np.isfinite(total[-1]) and values.min() >= 0 and total[-1] > 0):
        raise ParameterError(
            f"importances of layer {layer} are not all finite and positive; does the model "
            "compute finite numbers for this prompt?"
        )
    shares: npt.NDArray[np.float64] = total / total[-1]
    return shares


def _counts(
    lengths: npt.NDArray[np.int64], steps: npt.NDArray[np.int64], keep: float
) -> npt.NDArray[np.int64]:
    check_keep(keep)
    layers = len(lengths)
    extra = max(round(keep * int(lengths.sum())) - layers, 0)
    return 1 + np.bincount(steps[:extra], minlength=layers)


def check_keep(keep: float) -> None:
    if not 0 < keep <= 1:  # NaN fails, too
        raise ParameterError(f"keep is {keep}; give a number above 0 and up to 1")


def grid(keep: float) -> tuple[float, ...]:
    """The keeps that a profile has rows for: 0.05 to 0.95, and ``keep``; rising."""
    check_keep(keep)
    return tuple(sorted({*GRID, keep}))


def mean_rows(fractions: npt.NDArray[np.float64], keeps: Sequence[float]) -> tuple[ProfileRow, ...]:
    """The rows from the samples' fractions [S,K,L]."""
    means = fractions.mean(0)
    return tuple(
        ProfileRow(keep, tuple(_with_mean(row, keep).tolist()))
        for keep, row in zip(keeps, means, strict=True)
    )


def _with_mean(fractions: npt.NDArray[np.float64], keep: float) -> npt.NDArray[np.float64]:
    """``fractions`` [L] scaled to the mean ``keep``; what would exceed 1 goes to the others."""
    out, free = np.ones_like(fractions), np.ones(len(fractions), bool)
    while free.any():
        wanted = keep * len(out) - (len(out) - free.sum())
        out[free] = fractions[free] * (wanted / fractions[free].sum())
        over = free & (out > 1)
        if not over.any():
            break
        out[over], free = 1.0, free & ~over
    return out
