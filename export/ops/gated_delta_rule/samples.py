"""Sample inputs of ``lvlm::GatedDeltaRule``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lvlm.export.ops.op import OpSample


def samples() -> Iterator[OpSample]:
    """Grouped heads and not; rows below, at and beyond whole chunks, down to one token and to none;
    states that are there and not; keys that repeat; decays from none to all at once."""
    layouts = {
        # name: (lengths, key heads, value heads, key size, value size, chunk)
        "one chunk": ([6], 2, 2, 16, 16, 8),
        "ragged, grouped": ([19, 8, 1], 2, 4, 16, 24, 8),
        "whole chunks": ([16, 9], 1, 3, 32, 16, 8),
        "one token": ([1], 2, 2, 16, 16, 4),
        "a row without tokens": ([5, 0], 1, 2, 8, 16, 2),
        "large chunks": ([70, 64], 2, 4, 16, 16, 64),
        "the same key again": ([60, 33], 1, 1, 16, 16, 64),
    }
    for seed, (name, (lengths, heads, all_heads, width, wide, chunk)) in enumerate(layouts.items()):
        random = torch.Generator().manual_seed(seed)
        length, extent = torch.tensor(lengths), max(lengths) + 1
        batch = len(lengths)
        query, key = (
            torch.nn.functional.normalize(torch.randn(*s, generator=random), dim=-1)
            for s in [(batch, extent, heads, width)] * 2
        )
        value = torch.randn(batch, extent, all_heads, wide, generator=random)
        gates = torch.rand(2, batch, extent, all_heads, generator=random)
        # Of most tokens next to nothing; of some all that there is
        decay, beta = -((4 * gates[0]) ** 6) / 100, gates[1]
        if name == "the same key again":
            key, decay, beta = key[:, :1].expand_as(key), 0 * decay, 0 * beta + 1
        state = torch.randn(batch, all_heads, width, wide, generator=random)
        if len(lengths) == 1:
            state = torch.zeros_like(state)
        padding = (torch.arange(extent) >= length[:, None])[:, :, None, None]
        for dtype in (torch.float32, torch.float16):
            data = query.to(dtype), key.to(dtype).contiguous(), value.to(dtype)
            yield OpSample(
                f"{name}, {str(dtype)[6:]}",
                (*data, decay, beta, state, length),
                {"chunk": chunk},
                {"output": padding},
            )
