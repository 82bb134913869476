"""ONNX Runtime's TensorRT provider, which gives TensorRT the parts of a graph that it takes.

A cache write is an ordinary scatter here: TensorRT's own wants its input and output in one place,
which the provider does not promise.
"""

from __future__ import annotations

from lvlm.export.targets.description import FLOATS, HALVES
from lvlm.export.targets.target import Target

TARGET = Target(
    name="ort-tensorrt",
    summary="ONNX Runtime's TensorRT provider: portable graphs, cache write decomposed",
    flavour="onnxruntime",
    version=(1,),
    platform="NVIDIA GPUs, onnxruntime-gpu 1.31 or newer with TensorRT 10 or 11",
    sms=(),
    opset=24,
    imports=frozenset({"RMSNormalization", "RotaryEmbedding"}),
    attention=HALVES,
    matmul_types=FLOATS,
    plugins=False,
    static_cache=False,
    topk_limit=None,
    verified="",
)
