"""TensorRT 10.16, the last of 10, on any GPU.

By NVIDIA's release notes it imports Attention from 10.14 on, RMSNormalization, RotaryEmbedding and
TensorScatter from 10.15 on; the headers of 10.15 have the layer that writes a cache
(IKVCacheUpdateLayer), those of 11.0 the first attention that takes lengths (IAttentionV2). Over a
cache its own attention reads every slot, under a mask: the plugin takes its place.
"""

from __future__ import annotations

import dataclasses

from lvlm.export.targets.trt_11 import TARGET as NEXT

TARGET = dataclasses.replace(
    NEXT,
    name="trt-10",
    summary="NVIDIA TensorRT 10.16: plugins, own attention of prompts and cache write",
    version=(10, 16),
    valid_only=True,
)
