"""How much scratch memory a plan asks for: what the built library is held against."""

from __future__ import annotations

from lvlm.plugins_trt.plugins.plugin_plan import (
    DATA,
    SCRATCH_ALIGNMENT,
    Plugin,
    Shapes,
    element_bytes,
)


def scratch_bytes(plugin: Plugin, shapes: Shapes, data: str) -> list[int]:
    """Bytes of each scratch buffer, each rounded up to SCRATCH_ALIGNMENT."""
    sizes: list[int] = []
    for buffer in plugin.scratch:
        total = element_bytes(data if buffer.dtype == DATA else buffer.dtype)
        for size in buffer.shape:
            total *= size(shapes)
        sizes.append(-(-total // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT)
    return sizes
