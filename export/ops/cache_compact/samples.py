"""Sample inputs of ``lvlm::CacheCompact``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lvlm.export.ops.op import OpSample


def samples() -> Iterator[OpSample]:
    """Budgets from one entry to all, ragged rows, ties, importance that is not finite; every
    layout in every mode that takes it."""
    nan, inf = float("nan"), float("inf")
    everywhere = ("evict", "merge", "merge-reference")
    layouts: dict[str, tuple[list[int], list[int], int, int, tuple[str, ...]]] = {
        # name: (lengths, budgets, sinks, recent, modes)
        "one row": ([13], [6], 1, 1, everywhere),
        "ragged": ([13, 8, 3], [5, 6, 3], 1, 1, everywhere),
        "long runs": ([200, 131], [5, 100], 1, 1, everywhere),
        "all stay": ([9, 7], [9, 7], 1, 1, everywhere),
        "one short": ([9, 3], [8, 2], 1, 1, everywhere),
        "nothing but protected": ([12, 8], [6, 6], 4, 2, everywhere[:2]),
        "one entry": ([7, 1], [1, 1], 0, 1, everywhere[:2]),
        "nothing protected": ([11, 9], [4, 2], 0, 0, everywhere[:2]),
        "ties": ([14], [6], 1, 1, everywhere),
        "not finite": ([6, 6, 6], [4, 4, 3], 1, 1, everywhere),
    }
    for seed, (name, (lengths, budgets, sinks, recent, modes)) in enumerate(layouts.items()):
        random = torch.Generator().manual_seed(seed)
        batch, extent = len(lengths), max(lengths) + 2
        length, budget = torch.tensor(lengths), torch.tensor(budgets)
        key, value = torch.randn(2, batch, 2, extent, 32, generator=random)
        importance = torch.rand(batch, extent, generator=random)
        if name == "ties":
            importance = (importance * 3).floor()
        if name == "not finite":
            importance[0, 3], importance[2, 1] = nan, inf
        padding = torch.arange(extent) >= length[:, None]
        importance[padding] = nan
        key, value = (t.masked_fill(padding[:, None, :, None], nan) for t in (key, value))
        # Other protected counts are other graphs; one type is enough of those.
        dtypes = (torch.float32, torch.float16)[: 2 if (sinks, recent) == (1, 1) else 1]
        for dtype in dtypes:
            for mode in modes:
                yield OpSample(
                    f"{name}, {str(dtype)[6:]}, {mode}",
                    (
                        key.to(dtype),
                        value.to(dtype),
                        importance,
                        length,
                        budget,
                        torch.arange(max(budgets)),
                    ),
                    {"mode": mode, "sinks": sinks, "recent": recent},
                )
