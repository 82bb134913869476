"""TensorRT 11 without the plugin library: the lvlm ops' functions are built from standard ops.

For machines without a C++ compiler, and to compare plugins with. TensorRT documents a limit of its
TopK, which ranks tokens and cache entries here.
"""

from __future__ import annotations

import dataclasses

from lvlm.export.targets.trt_11 import TARGET as WITH_PLUGINS

TARGET = dataclasses.replace(
    WITH_PLUGINS,
    name="trt-11-portable",
    summary="NVIDIA TensorRT 11 without plugins: at most 3,840 tokens or entries are ranked",
    plugins=False,
)
