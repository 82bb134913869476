"""Jetson Thor with JetPack 7, whose TensorRT is 10.13.

NVIDIA's release notes have the first import of Attention in 10.14, of RMSNormalization,
RotaryEmbedding and TensorScatter in 10.15: all are decomposed here.
"""

from __future__ import annotations

from lvlm.export.targets.description import FLOATS, PACKED, SignedWeights
from lvlm.export.targets.target import Target

TARGET = Target(
    name="jetson-thor-jp7",
    summary="Jetson Thor, JetPack 7, TensorRT 10.13: plugins, attention among them",
    flavour="tensorrt",
    version=(10, 13),
    platform="Jetson Thor, JetPack 7",
    sms=(110,),
    opset=22,
    imports=frozenset(),
    attention=frozenset(),
    matmul_types=FLOATS,
    plugins=True,
    static_cache=True,
    topk_limit=3840,
    signed=SignedWeights(PACKED),
    valid_only=True,
    verified="",
)
