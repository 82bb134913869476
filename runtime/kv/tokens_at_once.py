"""Tokens read at once as decode would read them one by one: which entries stay, leave and come.

Which token takes whose slot is a matter of counting, so decode's own steps are counted here before
anything is run. The graph extend then does what they would have done (extend_kept.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lvlm.runtime.kv.slot_counts import SlotCounts


@dataclass(frozen=True)
class TokensAtOnce:
    """``inputs`` of the graph extend that say so; ``positions`` [T] int64 of the tokens where these
    are counts of entries (released code), None: their true ones."""

    inputs: dict[str, np.ndarray]
    positions: np.ndarray | None


def at_once(counts: SlotCounts, tokens: int) -> TokensAtOnce:
    """Count so many tokens as fed to decode, one after the other, in the one row of ``counts``.

    Where there is compaction at intervals, at most ``until_compaction`` of them: it is part of the
    step that ends an interval.
    """
    layers, slots = len(counts.capacities), int(counts.capacities.max())
    every, one = np.arange(layers), np.ones(1, bool)
    there = counts.lengths[:, 0].copy()
    lies = np.tile(np.arange(slots), (layers, 1))  # in each slot: an entry's own slot, or that
    until = np.full((layers, slots + tokens), tokens)  # of the t-th new one, slots + t
    lowest = counts.capacities.copy()
    ring = np.arange(counts.queries)
    positions = np.zeros(tokens, np.int64)
    for token in range(tokens):
        positions[token] = counts.positions(np.zeros(1, np.int64))[0]
        if counts.queries:
            ring[counts.query_index] = counts.queries + token
        slot = counts.next_slot()[0][:, 0]
        taken = counts.victims[:, 0] >= 0
        until[every[taken], lies[every, slot][taken]] = token
        lies[every, slot] = slots + token
        lowest = np.minimum(lowest, slot)
        counts.advance(one)
    inputs = {
        "write_index": lowest[:, None],
        "new_until": until[:, slots:],
        **({"ring_slots": ring} if counts.queries else {}),
    }
    for layer in range(layers):
        past = int(there[layer])
        written = lies[layer, lowest[layer] : counts.lengths[layer, 0]]
        inputs |= {
            f"past_slots_{layer}": np.arange(past),
            f"past_until_{layer}": until[layer, :past],
            f"written_{layer}": np.where(written < slots, written, written - slots + past),
        }
    policy = counts.budgets.cache_policy
    counted = policy is not None and policy.positions == "layer0"
    return TokensAtOnce(inputs, positions if counted else None)
