"""Jetson Orin with JetPack 6.2, whose TensorRT is 10.3.

Its parser ends at opset 20 and imports none of the newer ops; the cache is written by a plugin.
DequantizeLinear has blocks from opset 21 on, so that int8 with one scale for each output is all of
quantized weights that it takes.
"""

from __future__ import annotations

from lvlm.export.targets.description import FLOATS, PACKED, SignedWeights
from lvlm.export.targets.target import Target

TARGET = Target(
    name="jetson-orin-jp62",
    summary="Jetson Orin, JetPack 6.2, TensorRT 10.3: plugins, attention among them",
    flavour="tensorrt",
    version=(10, 3),
    platform="Jetson Orin, JetPack 6.2",
    sms=(87,),
    opset=20,
    imports=frozenset(),
    attention=frozenset(),
    matmul_types=FLOATS,
    plugins=True,
    static_cache=True,
    topk_limit=3840,
    signed=SignedWeights({8: PACKED[8]}),
    valid_only=True,
    verified="",
)
