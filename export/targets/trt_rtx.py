"""TensorRT-RTX: portable graphs, built ahead of time on any machine, run on RTX GPUs.

Attention has no kernel for several query rows in fp32, and none for one row of less than 4 heads.
Plugin libraries are loaded, but to use a
plugin ends the process: the functions stay.
"""

from __future__ import annotations

from lvlm.export.targets.description import FLOATS, HALVES, NEW_OPS, PACKED, SignedWeights
from lvlm.export.targets.target import Target

TARGET = Target(
    name="trt-rtx",
    summary="NVIDIA TensorRT-RTX: static cache length, fp32 attention decomposed",
    flavour="tensorrt-rtx",
    version=(1,),
    platform="RTX GPUs from Ampere on, Linux and Windows",
    sms=(80, 86, 89, 120, 121),
    opset=24,
    imports=NEW_OPS,
    attention=HALVES,
    row_heads=4,
    matmul_types=FLOATS,
    plugins=False,
    static_cache=True,
    topk_limit=None,
    signed=SignedWeights(PACKED, negative_scales=(4,)),
    verified="1.7: every graph is built, without a GPU; not run",
)
