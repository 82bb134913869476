"""Integers of 4 or 8 bits out of the 32-bit words that checkpoints keep them in."""

from __future__ import annotations

import torch


def fields_of(words: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """The numbers uint8 in ``words`` int32 [R,C], the lowest bits first: [R * 32 / bits, C] where
    they lie one after the other along ``axis`` 0, [R, C * 32 / bits] along axis 1."""
    count = 32 // bits
    rows, columns = words.shape
    shape = (rows, count, columns) if axis == 0 else (rows, columns, count)
    found = torch.empty(shape, dtype=torch.uint8)
    for place in range(count):
        part = (words >> (bits * place)).bitwise_and_((1 << bits) - 1)
        found.select(axis + 1, place).copy_(part)
    return found.view(rows * count, columns) if axis == 0 else found.view(rows, columns * count)
