"""Jetson Orin and Thor with JetPack 7.2, whose TensorRT is 10.16 and whose Python is 3.12."""

from __future__ import annotations

import dataclasses

from lvlm.export.targets.trt_10 import TARGET as ANYWHERE

TARGET = dataclasses.replace(
    ANYWHERE,
    name="jetson-jp72",
    summary="Jetson Orin and Thor, JetPack 7.2, TensorRT 10.16: plugins, own attention of prompts",
    platform="Jetson Orin and Thor, JetPack 7.2",
    sms=(87, 110),
)
