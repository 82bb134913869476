"""How much scratch memory a plan asks for: what the built library is held against."""

from __future__ import annotations

from lvlm.plugins_trt.plugins.plugin_plan import DATA, Plugin
from lvlm.plugins_trt.plugins.sizes import Shapes

ALIGNMENT = 256
BYTES = {"float32": 4, "int32": 4, "int64": 8, "float16": 2, "bfloat16": 2, "int8": 1}


def scratch_bytes(plugin: Plugin, shapes: Shapes, data: str, word: str | None = None) -> list[int]:
    """Bytes of each scratch buffer of a variant, each rounded up to ALIGNMENT."""
    sizes: list[int] = []
    for buffer in plugin.scratch_for(word):
        total = BYTES[data if buffer.dtype == DATA else buffer.dtype]
        for size in buffer.shape:
            total *= size(shapes)
        sizes.append(-(-total // ALIGNMENT) * ALIGNMENT)
    return sizes
