"""ONNX Runtime's CUDA provider: the canonical graphs, which need no lowering.

It has kernels for Attention, RMSNormalization, RotaryEmbedding and TensorScatter, and inlines the
functions of the lvlm ops.
"""

from __future__ import annotations

from lvlm.export.targets.description import FLOATS, NEW_OPS
from lvlm.export.targets.target import Target

TARGET = Target(
    name="ort-cuda",
    summary="ONNX Runtime's CUDA provider: portable graphs, nothing to build",
    flavour="onnxruntime",
    version=(1,),
    platform="NVIDIA GPUs, onnxruntime-gpu 1.31 or newer",
    sms=(),
    opset=24,
    imports=NEW_OPS,
    attention=FLOATS,
    matmul_types=FLOATS,
    plugins=False,
    static_cache=False,
    topk_limit=None,
    verified="",
)
