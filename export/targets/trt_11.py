"""TensorRT 11 on desktop and data-centre GPUs.

Its parser is the one TensorRT-RTX shares, which is how far it was seen: Attention in half
precision, KVCacheUpdate from TensorScatter (both in 10.15 already). Scales of DequantizeLinear are
to be positive by the headers of 10.14, which TensorRT-RTX does not ask.
"""

from __future__ import annotations

from lvlm.export.targets.description import FLOATS, HALVES, NEW_OPS, PACKED, SignedWeights
from lvlm.export.targets.target import Target

TARGET = Target(
    name="trt-11",
    summary="NVIDIA TensorRT 11: plugins, attention and cache write of its own",
    flavour="tensorrt",
    version=(11,),
    platform="NVIDIA GPUs from Turing on, Linux and Windows",
    sms=(),
    opset=24,
    imports=NEW_OPS,
    attention=HALVES,
    matmul_types=FLOATS,
    plugins=True,
    static_cache=True,
    topk_limit=3840,
    signed=SignedWeights(PACKED),
    verified="",
)
