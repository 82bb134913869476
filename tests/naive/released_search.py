"""PrefixKV's search as its released code has it, for what is recorded of that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


def search_reference(
    importances: Sequence[torch.Tensor], evicted: float, *, sinks: int = 1, recent: int = 1
) -> npt.NDArray[np.float64]:
    """What the released code's search gives: the fraction [L] of each layer to evict.

    importances [B,N] of every layer, N the same for all; ``evicted`` is 1 - keep. Its quirks: row 0
    decides for the batch, protected entries are subtracted although the fractions apply to all
    entries, the bisection stops within 5 entries, and scaling to the target rounds down. Sums are
    torch's in fp32, since rounding decides near ties.
    """
    ordered = [s[0].float().sort(descending=True).values for s in importances]
    shares = torch.stack([(s / s.sum()).cumsum(0) for s in ordered])
    length = shares.shape[1]
    target = shares.numel() * evicted

    def evictions(threshold: float) -> npt.NDArray[np.int64]:
        wanted = torch.full((len(shares), 1), threshold)
        kept = torch.searchsorted(shares, wanted)[:, 0] + 1
        return (length - kept - sinks - recent).clamp(min=0).numpy()

    low, high = 0.0, 1.0
    while True:
        middle = (low + high) / 2
        counts = evictions(middle)
        if abs(counts.sum() - target) < 5 or middle in (low, high):
            break
        low, high = (low, middle) if counts.sum() < target else (middle, high)
    scaled = (counts * target / max(1, counts.sum())).astype(np.int32)
    fractions: npt.NDArray[np.float64] = scaled / length
    return fractions
