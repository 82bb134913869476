"""TensorRT-RTX with Turing (RTX 20, sm_75) among the GPUs, which multiplies matrices in fp16 only.

The lvlm ops rank in fp32 whatever the data; here their MatMuls are in fp16, scaled so that they
cannot overflow. Ranks that differ by less than fp16 can tell may change places. One engine serves
all generations; those that need no Turing are better off with trt-rtx.
"""

from __future__ import annotations

import dataclasses

from lvlm.export.targets.trt_rtx import TARGET as AMPERE

TARGET = dataclasses.replace(
    AMPERE,
    name="trt-rtx-turing",
    summary="NVIDIA TensorRT-RTX from Turing on: fp16 bundles, every MatMul in fp16",
    platform="RTX GPUs from Turing on, Linux and Windows",
    sms=(75, *AMPERE.sms),
    matmul_types=frozenset({"float16"}),
)
