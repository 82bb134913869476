"""What rounding decides, rankings of cache entries above all: there two right answers go apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lvlm.export.recipes.parts import cache_rule

# Attention, or logits, that two implementations compute in fp32 differ by as much, as a part.
NEAR = 1e-5
COMPACT = cache_rule.CACHE_COMPACT


@contextmanager
def lead_of_what_stays() -> Iterator[list[float]]:
    """Of every compaction of the torch reference within, in every layer: how far the last entry
    that stays is ahead of the first one that goes, as a part of its importance."""
    leads: list[float] = []

    def noted(*inputs: Any, **attributes: Any) -> Any:
        _, _, importance, lengths, budgets, _ = inputs
        sinks, recent = attributes["sinks"], attributes["recent"]
        for scores, length, budget in zip(importance, lengths, budgets, strict=True):
            free, stay = scores[sinks : int(length) - recent], int(budget) - sinks - recent
            if 0 < stay < len(free):
                last, gone = torch.sort(free, descending=True).values[stay - 1 : stay + 1].tolist()
                leads.append((last - gone) / last if last else 0.0)
        return COMPACT(*inputs, **attributes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_rule, "CACHE_COMPACT", noted)
        yield leads
