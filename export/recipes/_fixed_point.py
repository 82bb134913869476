"""What the recipes share that compact the prompt once and then evict one entry at a time.

After prefill an entry leaves whenever the cache exceeds its share: the one at the fixed point,
``distance`` before the end of what was kept of the prompt (arXiv 2407.18121, section 3.3).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lvlm.export.recipes._base import Recipe, choice, fraction, parameter, whole
from lvlm.export.recipes._cache import Positions, cap_above
from lvlm.runtime.bundle.manifest import Compression

KEEP = 0.5


@dataclass(frozen=True)
class FixedPoint(Recipe):
    """The parameters of fixed-point elimination."""

    kv_keep: float | None = parameter(KEEP, "fraction of the cache entries that stays, in (0, 1]")
    kv_cap: int | None = parameter(None, "most entries a layer keeps, whatever the fraction")
    kv_sinks: int = parameter(1, "first tokens, which always stay")
    distance: int = parameter(25, "decode evicts this far before the end of the kept prompt")
    positions: Positions = parameter("true", "of new tokens: true, or layer0 (released code)")

    def __post_init__(self) -> None:
        if self.kv_keep is not None:
            fraction("kv_keep", self.kv_keep)
        whole("kv_sinks", self.kv_sinks, 0)
        whole("distance", self.distance, 1)
        choice("positions", self.positions, Positions)
        cap_above(self.kv_cap, self.kv_sinks + 1)

    def compression(self, **changes: Any) -> Compression:
        """The rule as data; ``changes`` are fields of Compression."""
        plain = Compression(
            keep=self.kv_keep or KEEP,
            profile=(),
            cap=self.kv_cap,
            floor=0,
            sinks=self.kv_sinks,
            recent=1,
            distance=self.distance,
            interval=None,
            queries=0,
            positions=self.positions,
            semantics="paper",
        )
        return dataclasses.replace(plain, **changes)
